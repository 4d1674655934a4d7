"""Process 0's part of the watch over a run's processes: it hears each of them, and tells all what concerns all.

See watch.py, which is the other end of every connection. Messages are lines of JSON.
"""

import contextlib
import json
import socket
import sys
import threading
import time

from lorweb_jax.common.errors import UserError

SILENCE = 60.0  # s without a sign of life after which a process counts as gone
PATIENCE = 300.0  # s that the first process waits for the last one at the start
GRACE = 10.0  # s that processes have to end by themselves after another one ended with an error


class Link:
    """One process as process 0 sees it."""

    def __init__(self, connection: socket.socket, host: str):
        self.connection, self.host, self.heard = connection, host, time.monotonic()
        self.lock = threading.Lock()

    def send(self, message: dict) -> None:
        with self.lock, contextlib.suppress(OSError):  # one that is gone is found out by its reader
            self.connection.sendall(json.dumps(message).encode() + b"\n")


class Hub:
    """Waits for `count` processes at a port, and then for what they say."""

    def __init__(self, port: int, count: int, silence: float = SILENCE, patience: float = PATIENCE):
        """UserError if the port is taken."""
        self.count, self.silence, self.patience = count, silence, patience
        self.links: dict[int, Link] = {}
        self.steps: dict[int, int] = {}  # after which each process can stop
        self.finished: set[int] = set()
        self.ended = False
        self.lock = threading.RLock()
        both = socket.has_dualstack_ipv6()
        try:
            self.server = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=count
            )
        except OSError as error:
            raise UserError(
                f"port {port} of {socket.gethostname()} can't be used ({error.strerror}); end what uses "
                "it, or give JAX_COORDINATOR_ADDRESS another port"
            ) from None
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

    def _greet(self, connection: socket.socket, hello: dict) -> tuple[int, Link]:
        index, link = int(hello["index"]), Link(connection, str(hello["host"]))
        with self.lock:
            if index in self.links or not 0 <= index < self.count:
                link.send(
                    {
                        "refused": f"there is a process {index} of {self.count} already, on {self.links[index].host}"
                        if index in self.links
                        else f"process {index} was started, but there are only {self.count}"
                    }
                )
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
            asleep = sleep(self.silence / 20)
            self._tell({"beat": 0})
            now = time.monotonic()
            with self.lock:
                silent = [
                    index
                    for index, link in self.links.items()
                    if now - link.heard > self.silence and asleep < self.silence / 2
                ]
                missing = [index for index in range(self.count) if index not in self.links]
            if silent:
                self._lost(silent[0], f"nothing was heard of it for {self.silence:.0f} s")
            elif missing and now - start > self.patience:
                self._lost(missing[0], f"it did not come within {self.patience:.0f} s")


def sleep(seconds: float) -> float:
    """How long it took: much longer where this process itself stood still, and what others sent is still unread."""
    start = time.monotonic()
    time.sleep(seconds)
    return time.monotonic() - start
