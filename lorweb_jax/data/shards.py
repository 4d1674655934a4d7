"""webdataset's shards: tar archives in which files that share a name up to the first dot are one sample.

    frame/000.before.jpg  frame/000.after.jpg  frame/000.txt        caption in the .txt, task "frame"
    000.before.png  000.after.png  000.json                         {"caption": …, "task": …} in the .json

webdataset itself reads shards from one end to the other. A stream that is shuffled, shared by hosts and resumed needs
samples by number, so the archives' headers are listed once (tarfile) and images are read from where they lie.
"""

import dataclasses
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Task, Tell, file_bytes, file_changed
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.rows import AFTER, BEFORE, CAPTION, TASK, Row, read_rows
from lorweb_jax.images.io import decode_image, encoded_size

SUFFIX = ".tar"
_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]+)", re.DOTALL)  # key and extension, as webdataset splits a name
_TEXT_BYTES = 1_000_000  # of a sample's caption or json


class Part(NamedTuple):
    """A file within a shard: its name there, where it begins, its size; bytes."""

    name: str
    start: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class ShardPair:
    """Follows data/analogies.py's Pair: two files within a shard, and the edit as an instruction."""

    shard: str
    before: Part
    after: Part
    instruction: str

    @property
    def places(self) -> tuple[str, str]:
        return self._place(self.before), self._place(self.after)

    def _place(self, part: Part) -> str:
        return f"{self.shard}/{part.name}"

    def read(self, tell: Tell | None = None) -> tuple[np.ndarray, np.ndarray]:
        before, after = (decode_image(self._bytes(part), self._place(part), tell) for part in (self.before, self.after))
        return before, after

    def size(self) -> tuple[int, int]:
        return encoded_size(self._bytes(self.before), self._place(self.before))

    def _bytes(self, part: Part) -> bytes:
        try:
            with open(self.shard, "rb") as file:
                file.seek(part.start)
                data = file.read(part.size)
        except OSError as error:
            raise UserError(f"the shard {self.shard} can't be read ({error.strerror}); check the path") from None
        if len(data) < part.size:
            raise UserError(f"the shard {self.shard} ends within {part.name}; replace it by an intact copy")
        return data

    def nbytes(self) -> tuple[int, int]:
        there = file_bytes(self.shard) >= 0
        return (self.before.size, self.after.size) if there else (-1, -1)

    def changed(self) -> int:
        return file_changed(self.shard)


def shards(root: Path) -> list[Path]:
    """The shards that `root` is or holds."""
    if root.suffix.lower() == SUFFIX and not root.is_dir():
        return [root]
    try:
        return sorted(
            file for file in root.iterdir() if file.suffix.lower() == SUFFIX and not file.name.startswith(".")
        )
    except OSError:
        return []


def read_tasks(root: Path, problems: Problems) -> list[Task]:
    """The tasks of a shard or a folder of shards. Images are looked up, not decoded.

    A sample's task is what its json says, else the folder in its key; samples with neither are one task, called as the
    shard or folder. Adds to `problems`: a shard that is damaged or compressed; a sample that lacks an image, or a
    caption where others have one, or whose texts can't be read; a task with fewer than two pairs.

    Raises UserError if there is no sample with both images.
    """
    rows = [row for shard in shards(root) for row in _rows(shard, problems)]
    if not rows and len(problems):
        raise UserError(f"no shard of {root} can be read; {problems.summary()}")
    return read_rows(rows, root, _pair, problems)


def _pair(row: Row, instruction: str) -> ShardPair:
    for side in (BEFORE, AFTER):
        if row.values[side] is None:
            raise ValueError(f"the sample has no .{side} image")
    return ShardPair(row.values["shard"], row.values[BEFORE], row.values[AFTER], instruction)


def _rows(shard: Path, problems: Problems) -> Iterator[Row]:
    samples: dict[str, dict[str, Part]] = {}
    length, end = file_bytes(str(shard)), 0
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                end = member.offset_data + member.size
                match = _NAME.fullmatch(member.name)
                if match and member.isreg() and end <= length:
                    part = Part(member.name, member.offset_data, member.size)
                    samples.setdefault(match[1], {})[match[2].lower()] = part
        if length < end + 2 * tarfile.BLOCKSIZE:  # which an archive ends with, all zero
            raise tarfile.ReadError("it ends as if it were cut off")
    except (tarfile.TarError, OSError, ValueError) as error:  # what was listed so far is used
        reason = f"is a damaged archive, or a compressed one, which must be unpacked first ({error})"
        problems.add(shard.stem, shard.name, reason)
    for key, parts in samples.items():
        where = f"{shard.name}/{key}"
        try:
            yield Row(where, {"shard": str(shard), **_values(shard, key, parts)})
        except (ValueError, RecursionError, OSError) as error:
            problems.add(shard.stem, where, f"the sample's texts can't be read: {error}")


def _values(shard: Path, key: str, parts: dict[str, Part]) -> dict[str, Any]:
    values: dict[str, Any] = {
        side: next((part for name, part in parts.items() if name.startswith(f"{side}.")), None)
        for side in (BEFORE, AFTER)
    }
    described = json.loads(_text(shard, parts["json"])) if "json" in parts else {}
    if not isinstance(described, dict):
        raise ValueError(f"its json holds a {type(described).__name__}, expected an object")
    caption = _text(shard, parts["txt"]).strip() if "txt" in parts else described.get(CAPTION)
    task = described.get(TASK)
    if task is None or task == "":  # a task may be called 0
        task = os.path.dirname(key) or None
    return values | {CAPTION: caption, TASK: task}


def _text(shard: Path, part: Part) -> str:
    if part.size > _TEXT_BYTES:
        raise ValueError(f"{part.name} has {part.size:,} bytes, at most {_TEXT_BYTES:,} were expected")
    with open(shard, "rb") as file:
        file.seek(part.start)
        return file.read(part.size).decode("utf-8-sig")
