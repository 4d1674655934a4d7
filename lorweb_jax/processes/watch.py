"""The processes of one run, on one or many hosts, watch each other and agree when to stop.

Every process holds a connection to process 0 and sends a sign of life every few seconds. A process whose connection
closes (killed) or falls silent (host or network gone) ends the run: the others print one sentence that names it and
exit with status 1, also when their main thread waits in a collective that will never return. jax's own heartbeats
would end them too, later and by a crash report. Messages are lines of JSON; no jax here, so that it can begin before.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.processes.hub import GRACE, PATIENCE, SILENCE, Hub, sleep

LAST = 3.0  # s that process 0, where jax's coordinator lives, waits for the others to end before it


class Peers:
    """This process among all of the run."""

    def __init__(
        self, address: tuple[str, int], index: int, count: int, *, silence: float = SILENCE, patience: float = PATIENCE
    ):
        """Meets the others at `address` = (host, port) of process 0; returns when all are there.

        UserError if process 0 can't be reached within `patience` seconds, or is of another run.
        """
        self.index, self.count, self.silence = index, count, silence
        self.hosts: list[str] = []
        self.advice: Callable[[], str] = lambda: "start all processes again"  # what a loss means for the run
        self.on_stop: Callable[[], None] = lambda: None  # what to do when a stop is asked for
        self.until: int | None = None
        self.leaving = False
        self.loss = ""  # the sentence about another process that is gone
        self.hub = Hub(address[1], count, silence, patience) if index == 0 else None
        self._met, self._agreed, self._finished = threading.Event(), threading.Event(), threading.Event()
        self.connection = self._reach(address, patience)
        self.lines = self.connection.makefile("r")
        self._lock, self._ending, self.heard = threading.Lock(), threading.Lock(), time.monotonic()
        self._send({"index": index, "host": socket.gethostname(), "command": sys.argv[1:]})
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()
        self._met.wait()
        if not self.hosts:
            raise UserError(
                f"this process can't join the run: {self.loss}; start all processes with the same options "
                "and count, each with a number of its own"
            )

    def ask_stop(self) -> None:
        """Let all processes call `on_stop`."""
        self._send({"stop": True})

    def can_stop(self, step: int) -> None:
        """Say that this process will have done `step` steps, and waits to hear when all of them stop."""
        self._send({"at": step})

    def agreed(self) -> int:
        """The step after which all stop: the latest that one of them named in `can_stop`."""
        self._agreed.wait()
        return self.until

    def leave(self, sentence: str) -> None:
        """End all processes at once, with the status of a stopped run; process 0 prints the sentence."""
        self._send({"leave": sentence})

    def finish(self) -> None:
        """Return once all processes have called this."""
        self._send({"finished": True})
        self._finished.wait()

    def end(self, why: str, status: int) -> None:
        """End this process because of an error of its own, which is told to the others."""
        self.leaving = True
        sys.stdout.flush()
        self._send({"ended": why})
        self._exit(status, GRACE + LAST)

    def end_for(self, seconds: float) -> None:
        """End this process if another one is found to be gone within the time."""
        end = time.monotonic() + seconds
        while not self.loss and time.monotonic() < end:
            time.sleep(0.05)
        if self.loss:
            self._end_with_loss()

    def _reach(self, address: tuple[str, int], patience: float) -> socket.socket:
        end = time.monotonic() + patience
        address = ("localhost", address[1]) if self.hub else address
        while True:
            try:
                connection = socket.create_connection(address, timeout=5)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as error:
                if time.monotonic() > end:
                    raise UserError(
                        f"process {self.index} of {self.count} could not reach process 0 at {address[0]}, port "
                        f"{address[1]}, within {patience:.0f} s ({error.strerror or error}); start all processes, and "
                        "check JAX_COORDINATOR_ADDRESS and that nothing blocks its port and the next one"
                    ) from None
                time.sleep(0.2)

    def _send(self, message: dict) -> None:
        with self._lock, contextlib.suppress(OSError):  # a lost connection is found out by _listen
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for line in self.lines:
                self.heard = time.monotonic()
                self._take(json.loads(line))
        self._lost(0, self.hosts[0] if self.hosts else "unknown", "its connection closed")

    def _take(self, message: dict[str, Any]) -> None:
        match message:
            case {"hosts": hosts}:
                self.hosts = hosts
                self._met.set()
            case {"refused": why}:
                self.loss, self.leaving = why, True
                self._met.set()
            case {"stop": _}:
                self.on_stop()
            case {"until": step}:
                self.until = step
                self._agreed.set()
            case {"finished": _}:
                self.leaving = True
                self._finished.set()
            case {"leave": sentence}:
                self.leaving = True
                if self.hub:
                    write_at_once(1, sentence)
                self._exit(stop_status(), LAST)
            case {"gone": index, "host": host, "why": why, "grace": grace}:
                self._lost(index, host, why, grace)

    def _beat(self) -> None:
        while not self.leaving:
            asleep = sleep(self.silence / 20)
            self._send({"beat": self.index})
            if time.monotonic() - self.heard > self.silence and asleep < self.silence / 2:
                self._lost(
                    0, self.hosts[0] if self.hosts else "unknown", f"nothing was heard of it for {self.silence:.0f} s"
                )

    def _lost(self, index: int, host: str, why: str, grace: float = 0.0) -> None:
        if self.leaving or index == self.index:
            return
        verb = "" if why.startswith(("ended", "was")) else "is gone: "
        self.loss = f"process {index} (host {host}) {verb}{why}"
        end = time.monotonic() + grace
        while time.monotonic() < end:  # this process may be about to end with the same error
            time.sleep(0.05)
            if self.leaving:
                return
        self._end_with_loss()

    def _end_with_loss(self) -> None:
        self._ending.acquire()  # never released: the first thread that comes here ends the process
        self.leaving = True
        write_at_once(2, f"error: {self.loss}; {self.advice()}")
        self._exit(1, LAST)

    def _exit(self, status: int, wait: float) -> None:
        """End the process whatever its other threads are in."""
        end = time.monotonic() + wait
        while self.hub and self.hub.links.keys() - {0} and time.monotonic() < end:
            time.sleep(0.02)
        os._exit(status)


def write_at_once(stream: int, sentence: str) -> None:
    """To file descriptor 1 or 2, whatever other threads are writing, and whether or not anyone reads it."""
    with contextlib.suppress(OSError):
        os.write(stream, f"{sentence}\n".encode())


def stop_status() -> int:
    """Exit status of a run that SIGTERM stopped before its end: LORWEB_STOP_STATUS, or 0."""
    return int(os.environ.get("LORWEB_STOP_STATUS", "0"))
