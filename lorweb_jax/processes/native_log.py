"""Replaces what jax's coordination service logs before it aborts a process by a sentence.

When another process of a run is gone, or a process cannot join, jax's C++ client writes a fatal log entry to standard
error and calls abort(). Its Python callback for this (`missed_heartbeat_callback`) cannot be used: in jaxlib 0.10.2 the
status that it is called with has no conversion to Python, and the call terminates the process. So standard error is
replaced by a pipe while there are several processes, and abort() is delayed until the entry has been read.
"""

import contextlib
import ctypes
import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

from lorweb_jax.common.errors import patient_output

HOLD = 5.0  # s for which entries of the coordination service are held back: a fatal one usually follows
# absl's log entries: I1126 18:29:12.165912    7087 coordination_service.cc:1549] text
_ENTRY = re.compile(
    rb"^[IWEF]\d{4} [\d:.]+ +\d+ (coordination_service\w*\.\w+|preemption_\w+\.cc|client\.h):\d+\]", re.MULTILINE
)
_FATAL = b"Terminating process because the JAX distributed service detected fatal errors"


class NativeLog:
    """A pipe in the place of standard error. All text passes through it; entries of the coordination service are held
    back for HOLD seconds, and dropped if the process ends within them."""

    def __init__(self, on_fatal: Callable[[str], None]):
        """on_fatal(status): called from another thread with the text of a fatal entry's absl::Status; it must end the
        process within 6 s."""
        self.on_fatal = on_fatal
        self.stderr = os.dup(2)
        self._pipe, write = os.pipe()
        os.dup2(write, 2)
        os.close(write)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        # A handler that is a C function holds up only the thread that aborts: sleep(SIGABRT), 6 s.
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes, self._libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        self._libc.signal(signal.SIGABRT, ctypes.cast(self._libc.sleep, ctypes.c_void_p))

    @contextlib.contextmanager
    def python_bypasses(self) -> Iterator[None]:
        """Context in which sys.stderr writes to the original standard error."""
        with open(self.stderr, "w", buffering=1, errors="backslashreplace", closefd=False) as stream:
            with contextlib.redirect_stderr(stream), patient_output():
                yield

    def close(self) -> None:
        """Restore standard error and the handling of SIGABRT."""
        self._libc.signal(signal.SIGABRT, None)
        os.dup2(self.stderr, 2)
        self._thread.join(1.0)

    def _read(self) -> None:
        held, end = b"", 0.0
        while True:
            if held and not select.select([self._pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                self._write(held)
                held = b""
            chunk = os.read(self._pipe, 65536)
            if not chunk:
                return self._write(held)
            if not held and (entry := _ENTRY.search(chunk)):
                self._write(chunk[: entry.start()])
                held, end = chunk[entry.start() :], time.monotonic() + HOLD
            elif held:
                held += chunk
            else:
                self._write(chunk)
            if _FATAL in held:
                status = held.partition(_FATAL)[2].partition(b"absl::Status: ")[2]
                self.on_fatal(status.partition(b"*** Check failure")[0].decode(errors="replace"))

    def _write(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(self.stderr, text)
