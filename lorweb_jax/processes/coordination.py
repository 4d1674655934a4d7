"""How the processes of a run end together: after one has died, on an error, on SIGTERM, or at the regular end.

jax's coordination service detects by heartbeats that a process has died, and ends the others; native_log.py turns its
log entry into a sentence. Errors and stops travel through its key-value store. A thread of every process waits for the
first entry under END, which ends all of them, even where the main thread is blocked in a collective.
"""

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from lorweb_jax.common.errors import UserError, message_and_status
from lorweb_jax.processes.native_log import NativeLog

LAST = 3.0  # s that process 0, which has the coordination service, stays for the others to end before it
END, GONE, OPTIONS = "lorweb/end", "lorweb/gone", "lorweb/options/"
NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # jax's preemption sync manager writes it when a process gets SIGTERM
_HOUR, _DAY = 3_600_000, 86_400_000  # ms


class Coordination:
    """One process's connection to the others of its run."""

    def __init__(self, address: str, count: int, index: int, patience: int, silence: int):
        """address: host:port of process 0. patience: seconds in which all processes have to start. silence: seconds
        without a heartbeat after which a process counts as gone."""
        self.address, self.count, self.index = address, count, index
        self.patience, self.silence = patience, silence
        self.hosts: dict[int, str] = {}  # of all processes, once they have met
        self.advice: Callable[[], str] = lambda: "start all processes again"  # what a loss means for the run
        self.on_stop: Callable[[], None] = lambda: None  # what to do when any process has got SIGTERM
        self.stop_asked = False
        self.client: Any = None  # of jax's coordination service
        self._ending = threading.Lock()  # never released: the first that takes it ends the process
        self._watching: list[threading.Thread] = []
        self.log = NativeLog(self._lost)

    def meet(self, options: Mapping[str, Any]) -> None:
        """Wait for all processes, compare their options with process 0's, and watch for the end from now on.

        Call it once jax.distributed is initialised. UserError, with status 2, if the options differ.
        """
        # No public interface to the key-value store; orbax uses this one too.
        from jax._src import distributed

        self.client = distributed.global_state.client
        options = {"the number of processes": self.count, **options}
        own = {"host": socket.gethostname(), "options": {name: repr(value) for name, value in options.items()}}
        self.client.key_value_set(f"{OPTIONS}{self.index}", json.dumps(own))
        self._watch(END, self._end_as_told)
        self.client.wait_at_barrier("lorweb/met", self.patience * 1000)
        entries = {key.rpartition("/")[2]: json.loads(text) for key, text in self.client.key_value_dir_get(OPTIONS)}
        self.hosts = {int(index): entry["host"] for index, entry in entries.items()}
        self._watch(NOTICE, self._stop_asked)
        here, first = own["options"], entries["0"]["options"]
        if differing := [name for name in {**first, **here} if first.get(name) != here.get(name)]:
            shown = ", ".join(f"{name} is {here.get(name)} here, {first.get(name)} there" for name in differing[:5])
            raise UserError(
                f"process {self.index} was started with other options than process 0: {shown}; give all processes the "
                "same",
                2,
            )

    def finish(self) -> None:
        """Wait until all processes have called this, then disconnect."""
        import jax

        self.client.wait_at_barrier("lorweb/finished", _DAY)
        self._ending.acquire()
        try:
            jax.distributed.shutdown()
        except Exception:
            self._ending.release()
            raise
        # They hear of it too. One that came back from jax's C++ while Python ends would abort the process.
        for thread in self._watching:
            thread.join(LAST)
        self.log.close()

    def leave(self, sentence: str) -> None:
        """Ask all processes, this one too, to end with the status of a stopped run; process 0 prints the sentence."""
        self._say_end({"stopped": sentence})

    def end(self, error: BaseException) -> NoReturn:
        """Show this process's error and end all processes. Where another one has ended the run already, show that."""
        if _of_a_lost_connection(error):
            # Another process may have died. Wait for the heartbeats to tell which; then _lost ends this process.
            time.sleep(1.5 * self.silence + 5.0)
        self._ending.acquire()
        sys.stdout.flush()
        if not message_and_status(error):
            traceback.print_exception(error)
        message, status = message_and_status(error) or (f"error: {type(error).__name__}, shown by that process", 1)
        write_at_once(self.log.stderr, message)
        self._say_end({"ended": message.removeprefix("error: "), "status": status})
        self._exit(status)

    def _say_end(self, entry: dict[str, Any]) -> None:
        if self.client:
            with contextlib.suppress(Exception):  # another process was faster, or the service is gone
                self.client.key_value_set(END, json.dumps(entry | {"index": self.index, "host": socket.gethostname()}))

    def _watch(self, key: str, then: Callable[[str], None]) -> None:
        def wait() -> None:
            value = None
            while value is None:
                try:
                    value = self.client.blocking_key_value_get(key, _HOUR)
                except Exception as error:
                    if "DEADLINE_EXCEEDED" not in str(error):
                        return  # the run has ended, or _lost will hear of it
            then(value)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        self._watching.append(thread)

    def _stop_asked(self, value: str) -> None:
        self.stop_asked = True
        self.on_stop()

    def _end_as_told(self, text: str) -> None:
        match json.loads(text):
            case {"stopped": sentence}:
                self._end(1 if self.index == 0 else None, sentence, stop_status())
            case {"ended": why, "status": status, "index": index, "host": host} if index != self.index:
                self._end(2, f"error: process {index} (host {host}) ended: {why}; {self.advice()}", status)

    def _lost(self, status: str) -> None:
        self.client = None  # it is locked by the thread that aborts
        self._end(2, f"error: {self._explained(status)}; {self.advice()}", 1)

    def _named(self, index: int) -> str:
        return f"process {index} (host {self.hosts.get(index, 'unknown')})"

    def _explained(self, status: str) -> str:
        """A sentence for the status with which jax's coordination service ends a process."""
        if silent := re.search(r"unhealthy \(stopped sending heartbeats\):\n([\d\n]+)", status):
            names = [self._named(int(index)) for index in silent[1].split()]
            verb = "is gone: nothing was heard of it" if len(names) == 1 else "are gone: nothing was heard of them"
            return f"{', '.join(names)} {verb} for {self.silence} s"
        if twice := re.search(r"(\d+) unexpectedly tried to connect", status):
            return f"process {twice[1]} was started a second time while the run was at it"
        if "newer incarnation" in status:
            return f"another process was started as process {self.index} too; give each a number of its own"
        if "Unexpected task registered" in status:
            return f"process {self.index} was started, but process 0 expects fewer processes than {self.count}"
        if "RegisterTask" in status and "DEADLINE_EXCEEDED" in status:
            return self._not_met()
        if "Failed to send RPC to coordination service" in status or "heartbeat" in status.lower():
            return f"{self._named(0)} is gone: it does not answer"
        return f"the processes of this run lost each other ({status.strip().partition(chr(10))[0]})"

    def _not_met(self) -> str:
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            return (
                f"process {self.index} of {self.count} could not reach process 0 at {self.address} within "
                f"{self.patience} s ({error.strerror or error}); check that nothing blocks that port"
            )
        return f"not all of the {self.count} processes came to {self.address} within {self.patience} s"

    def _end(self, stream: int | None, sentence: str, status: int) -> NoReturn:
        self._ending.acquire()
        if stream:
            write_at_once(self.log.stderr if stream == 2 else stream, sentence)
        self._exit(status)

    def _exit(self, status: int) -> NoReturn:
        """End the process whatever its threads are doing; process 0, which runs the service, after the others."""
        end = time.monotonic() + LAST
        client = self.client
        with contextlib.suppress(Exception):
            if client:
                client.key_value_increment(GONE, 1)
            while self.index == 0 and time.monotonic() < end:
                time.sleep(0.05)
                if client and client.key_value_increment(GONE, 0) >= self.count:
                    break
        os._exit(status)


def _of_a_lost_connection(error: BaseException | None) -> bool:
    """Whether a failed collective or barrier may be the cause of an error."""
    codes = "UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED"  # of absl; jax's classes for them vary
    while error is not None and not re.match(rf"({codes}): ", str(error)):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error is not None


def write_at_once(stream: int, sentence: str) -> None:
    """To a file descriptor, whatever other threads are writing, and whether or not anyone reads it."""
    with contextlib.suppress(OSError):
        os.write(stream, f"{sentence}\n".encode())


def stop_status() -> int:
    """Exit status of a run that SIGTERM stopped before its end: LORWEB_STOP_STATUS, or 0."""
    return int(os.environ.get("LORWEB_STOP_STATUS", "0"))
