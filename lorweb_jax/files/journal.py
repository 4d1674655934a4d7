"""What a long writing of files has finished, on disk beside them, so that the same command goes on after a kill.

Lines of JSON: first what is written from what (the `task`), then one for each finished tensor, in order, and one each
time that all data so far is known to be on the disk. A line that a kill cut short is dropped.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from lorweb_jax.common.errors import UserError


def write_all(descriptor: int, data: Any) -> None:
    """A raw write may stop short; this one goes on until all is written or the disk refuses."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class Finished(NamedTuple):
    """One tensor of one file, written whole; `digest` is the checksum of its bytes."""

    file: str
    tensor: str
    digest: str


class Journal:
    """`path` is made, or read if it is there and says the same `task` (what json can hold).

    Raises UserError if it says another task, or another process has it open.
    """

    def __init__(self, path: Path, task: dict[str, Any]):
        self.path = path
        self.finished: list[Finished] = []
        self.synced = 0  # so many of them were on the disk, whatever becomes of the machine
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process is writing {path.parent}; wait for it, or end it") from None
        if lines := self._lines():
            self._read(lines, task)
        else:
            self._append({"task": task})

    def add(self, finished: Finished) -> None:
        self.finished.append(finished)
        self._append(finished._asdict())

    def mark_synced(self, count: int) -> None:
        """The first `count` tensors are on the disk."""
        self.synced = count
        self._append({"synced": count})

    def keep(self, count: int) -> None:
        """Forget all but the first `count` tensors."""
        if count < len(self.finished):
            del self.finished[count:]
            self.synced = min(self.synced, count)
            self._append({"keep": count})

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def _append(self, line: dict[str, Any]) -> None:
        write_all(self._stream.fileno(), json.dumps(line).encode() + b"\n")

    def _lines(self) -> list[dict[str, Any]]:
        """The whole lines; what follows the last of them is cut off."""
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._stream.truncate(len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise UserError(f"{self.path} can't be read; remove {self.path.parent} and begin anew") from None

    def _read(self, lines: list[dict[str, Any]], task: dict[str, Any]) -> None:
        found = lines[0].get("task", {})
        if different := [name for name in task if found.get(name) != task[name]]:
            name = different[0]
            raise UserError(
                f"{self.path.parent} holds an unfinished conversion with another {name}; give the earlier "
                "command again to go on with it, or remove that folder to begin anew"
            )
        for line in lines[1:]:
            if "tensor" in line:
                self.finished.append(Finished(**line))
            elif "keep" in line:
                del self.finished[line["keep"] :]
                self.synced = min(self.synced, line["keep"])
            else:
                self.synced = line["synced"]
