"""Stopping on SIGTERM (preemption), in time and at the same step in all processes of a run.

The loop saves a checkpoint after the current step and ends; several processes agree on the step by jax's preemption
sync point. While there is nothing to save (before the end of the first step, after the last checkpoint) the run ends
at once. If the loop does not reach the end of a step in time (it compiles, or makes pictures), the run ends without a
checkpoint, before the cluster kills it.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable

from lorweb_jax.processes import distributed
from lorweb_jax.processes.coordination import stop_status, write_at_once

IN_TIME = 20.0  # s that the loop has to come to the end of a step; some 30 s are usual before a process is killed

_listening: set["StopRequest"] = set()


class StopRequest:
    """Whether this or another process of the run has received SIGTERM. Create it in the main thread."""

    def __init__(self, goes_on: Callable[[], str]):
        """goes_on(): from which step the run would go on, as part of a sentence."""
        self.goes_on, self.others = goes_on, distributed.others
        self.asked, self.done = False, 0
        self.at_stake = False  # whether a step was done since the last complete checkpoint
        self.safe = threading.Event()  # the loop has taken over, and saves
        self.lock = threading.RLock()
        _listening.add(self)
        if self.others:  # jax has the signal handler
            self.others.advice, self.others.on_stop = goes_on, self._stop
            if self.others.stop_asked:
                self._stop()
            return
        # Python runs a handler in the main thread, once it is back from compiling; a byte comes here at once.
        self.wakes, self.wake = socket.socketpair()
        self.wake.setblocking(False)
        self.fd_before = signal.set_wakeup_fd(self.wake.fileno(), warn_on_full_buffer=False)
        self.before = signal.signal(signal.SIGTERM, self._in_main_thread)
        threading.Thread(target=self._wait, daemon=True).start()

    def after(self, done: int) -> bool:
        """Whether the run stops after step `done`; the same in all processes, which call it after every step."""
        with self.lock:
            self.done, self.at_stake = done, True
            stopping = self.asked
        if self.others:
            from jax.experimental import multihost_utils

            stopping = multihost_utils.reached_preemption_sync_point(done)
        if stopping:
            self.safe.set()
        return stopping

    def saved(self) -> None:
        """Say that everything is saved: from now on the run may end at any moment."""
        with self.lock:
            self.at_stake = False
        if self.asked:
            self._leave("")

    def close(self) -> None:
        _listening.discard(self)
        if self.others:
            self.others.on_stop = lambda: None
            return
        signal.set_wakeup_fd(self.fd_before)
        signal.signal(signal.SIGTERM, self.before)
        self.wake.close()

    def _in_main_thread(self, number, frame) -> None:
        self.asked = True

    def _wait(self) -> None:
        with contextlib.suppress(OSError):
            while received := self.wakes.recv(1):
                if received[0] == signal.SIGTERM:
                    self._stop()

    def _stop(self) -> None:
        with self.lock:
            self.asked = True
            at_stake = self.at_stake
        if not at_stake:
            self._leave("")
        threading.Thread(target=self._in_time, daemon=True).start()

    def _in_time(self) -> None:
        if not self.safe.wait(IN_TIME) and self.at_stake:
            self._leave(f" {IN_TIME:.0f} s after it, in the middle of what follows step {self.done}")

    def _leave(self, when: str) -> None:
        sentence = f"stopped by SIGTERM{when}; {self.goes_on()}"
        if self.others:
            self.others.leave(sentence)
        else:
            write_at_once(1, sentence)
            os._exit(stop_status())


def _forget_in_child() -> None:
    """A forked process (a reader of images) must not stop the run on SIGTERM: it restores the default handler."""
    if _listening:
        with contextlib.suppress(ValueError):  # not the main thread: then no handler runs either
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
