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

from lorweb_jax.errors import UserError

SILENCE = 60.0    # s without a sign of life after which a process counts as gone
PATIENCE = 300.0  # s that the first process waits for the last one at the start
GRACE = 10.0      # s that processes have to end by themselves after another one ended with an error
LAST = 3.0        # s that process 0, where jax's coordinator lives, waits for the others to end before it


class _Link:
    """One process as process 0 sees it."""

    def __init__(self, connection: socket.socket, host: str):
        self.connection, self.host, self.heard = connection, host, time.monotonic()
        self.lock = threading.Lock()

    def send(self, message: dict) -> None:
        with self.lock, contextlib.suppress(OSError):  # one that is gone is found out by its reader
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Hub:
    """Process 0's part: hears each process, and tells all of them what concerns all."""

    def __init__(self, port: int, count: int, silence: float = SILENCE, patience: float = PATIENCE):
        """UserError if the port is taken."""
        self.count, self.silence, self.patience = count, silence, patience
        self.links: dict[int, _Link] = {}
        self.steps: dict[int, int] = {}  # after which each process can stop
        self.finished: set[int] = set()
        self.ended = False
        self.lock = threading.RLock()
        both = socket.has_dualstack_ipv6()
        try:
            self.server = socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET,
                                               dualstack_ipv6=both, backlog=count)
        except OSError as error:
            raise UserError(f"port {port} of {socket.gethostname()} can't be used ({error.strerror}); end what uses "
                            "it, or give JAX_COORDINATOR_ADDRESS another port") from None
        for work in (self._accept, self._beat):
            threading.Thread(target=work, daemon=True).start()

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = self.server.accept()
                threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection: socket.socket) -> None:
        """Everything that one process says, until it is gone."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError, ValueError, KeyError), connection.makefile("r") as lines:
            index, link = self._greet(connection, json.loads(lines.readline()))
            with contextlib.suppress(OSError, ValueError):
                for line in lines:
                    link.heard = time.monotonic()
                    self._take(index, json.loads(line))
            if self.links.get(index) is link:
                self._lost(index, "its connection closed")
                del self.links[index]

    def _greet(self, connection: socket.socket, hello: dict) -> tuple[int, _Link]:
        index, link = int(hello["index"]), _Link(connection, str(hello["host"]))
        with self.lock:
            if index in self.links or not 0 <= index < self.count:
                link.send({"refused": f"there is a process {index} of {self.count} already, on "
                           f"{self.links[index].host}" if index in self.links else f"process {index} was started, but "
                           f"there are only {self.count}"})
                raise ValueError
            self.links[index] = link
            if hello["command"] != sys.argv[1:]:
                self._lost(index, "was started with another command")
                link.send({"refused": f"process 0 was started with other options: {' '.join(sys.argv[1:])}"})
            elif len(self.links) == self.count:
                self._tell({"hosts": [self.links[number].host for number in range(self.count)]})
        return index, link

    def _take(self, index: int, message: dict) -> None:
        with self.lock:
            match message:
                case {"ended": why}:
                    self._lost(index, f"ended: {why}", GRACE)
                case {"at": step}:
                    self.steps[index] = step
                    if len(self.steps) == self.count:
                        self._tell({"until": max(self.steps.values())})
                case {"finished": _}:
                    self.finished.add(index)
                    if len(self.finished) == self.count:
                        self.ended = True
                        self._tell(message)
                case {"stop": _}:
                    self._tell(message)
                case {"leave": _} if not self.ended:
                    self.ended = True
                    self._tell(message)

    def _tell(self, message: dict) -> None:
        for link in list(self.links.values()):
            link.send(message)

    def _lost(self, index: int, why: str, grace: float = 0.0) -> None:
        with self.lock:
            if not self.ended:
                self.ended = True
                host = self.links[index].host if index in self.links else "unknown"
                self._tell({"gone": index, "host": host, "why": why, "grace": grace})

    def _beat(self) -> None:
        start = time.monotonic()
        while True:
            asleep = _sleep(self.silence / 20)
            self._tell({"beat": 0})
            now = time.monotonic()
            with self.lock:
                silent = [index for index, link in self.links.items()
                          if now - link.heard > self.silence and asleep < self.silence / 2]
                missing = [index for index in range(self.count) if index not in self.links]
            if silent:
                self._lost(silent[0], f"nothing was heard of it for {self.silence:.0f} s")
            elif missing and now - start > self.patience:
                self._lost(missing[0], f"it did not come within {self.patience:.0f} s")


class Peers:
    """This process among all of the run."""

    def __init__(self, address: tuple[str, int], index: int, count: int, *, silence: float = SILENCE,
                 patience: float = PATIENCE):
        """Meets the others at `address` = (host, port) of process 0; returns when all are there.

        UserError if process 0 can't be reached within `patience` seconds, or is of another run.
        """
        self.index, self.count, self.silence = index, count, silence
        self.hosts: list[str] = []
        self.advice: Callable[[], str] = lambda: "start all processes again"  # what a loss means for the run
        self.on_stop: Callable[[], None] = lambda: None                       # what to do when a stop is asked for
        self.until: int | None = None
        self.leaving = False
        self.loss = ""  # the sentence about another process that is gone
        self.hub = Hub(address[1], count, silence, patience) if index == 0 else None
        self._met, self._agreed, self._finished = threading.Event(), threading.Event(), threading.Event()
        self.connection = self._reach(address, patience)
        self.lines = self.connection.makefile("r")
        self._lock, self.heard = threading.Lock(), time.monotonic()
        self._send({"index": index, "host": socket.gethostname(), "command": sys.argv[1:]})
        for work in (self._listen, self._beat):
            threading.Thread(target=work, daemon=True).start()
        self._met.wait()
        if not self.hosts:
            raise UserError(f"this process can't join the run: {self.loss}; give every process its own number and the "
                            "same count, JAX_PROCESS_ID and JAX_NUM_PROCESSES")

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
                        "check JAX_COORDINATOR_ADDRESS and that nothing blocks its port and the next one") from None
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
            asleep = _sleep(self.silence / 20)
            self._send({"beat": self.index})
            if time.monotonic() - self.heard > self.silence and asleep < self.silence / 2:
                self._lost(0, self.hosts[0] if self.hosts else "unknown",
                           f"nothing was heard of it for {self.silence:.0f} s")

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
        self.leaving = True
        write_at_once(2, f"error: {self.loss}; {self.advice()}")
        self._exit(1, LAST)

    def _exit(self, status: int, wait: float) -> None:
        """End the process whatever its other threads are in."""
        end = time.monotonic() + wait
        while self.hub and self.hub.links.keys() - {0} and time.monotonic() < end:
            time.sleep(0.02)
        os._exit(status)


def _sleep(seconds: float) -> float:
    """How long it took: much longer where this process itself stood still, and what others sent is still unread."""
    start = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - start


def write_at_once(stream: int, sentence: str) -> None:
    """To file descriptor 1 or 2, whatever other threads are writing, and whether or not anyone reads it."""
    with contextlib.suppress(OSError):
        os.write(stream, f"{sentence}\n".encode())


def stop_status() -> int:
    """Exit status of a run that SIGTERM stopped before its end: LORWEB_STOP_STATUS, or 0."""
    return int(os.environ.get("LORWEB_STOP_STATUS", "0"))
