"""Arrays on disk by key, computed once and read by many: text embeddings by caption, image embeddings by pixels.

A folder holds identity.json, which says what the arrays were made by, and shards: safetensors files of some records
each, whose header lists their keys and the items (captions, image files) that they settle. A shard appears complete,
by a rename, or not at all. Any number of processes may fill one folder: whoever has the lock of a shard's name makes
it. Where the file system has no locks, some shards are made twice.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.locks import locked
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import write, write_json
from lorweb_jax.settings.rules import shown

IDENTITY = "identity.json"


class Store:
    """`key in store`, `gather`: records by key. `settled`: the items that need no work any more.

    A record is one row of each array of a shard, under the array's name.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], *, create: bool = False):
        """Opens the folder; with `create`, makes it where there is none.

        Raises UserError if there is none, if it was made by something else (the differences are named), if a shard
        is damaged, or if it can't be written.
        """
        self.folder = Path(folder)
        self.settled: set[str] = set()
        self._rows: dict[str, tuple[str, int]] = {}
        self._shards: dict[str, dict[str, np.ndarray]] = {}
        self._kind: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}  # dtype and shape of a record by array
        if create:
            _create(self.folder, identity)
        if not (self.folder / IDENTITY).is_file():
            raise UserError(
                f"{self.folder} holds nothing precomputed; run `python -m lorweb_jax.precompute` with the "
                "same options first, or leave --config.precomputed empty",
                2,
            )
        earlier = read_json(self.folder / IDENTITY)
        differing = [
            f"{name} was {shown(earlier.get(name))} and is {shown(identity.get(name))}"
            for name in sorted(earlier.keys() | identity.keys())
            if earlier.get(name) != identity.get(name)
        ]
        if differing:
            raise UserError(
                f"{self.folder} was precomputed for something else: {', '.join(differing)}; remove that "
                "folder or name another with --config.precomputed, and run `python -m "
                "lorweb_jax.precompute` again",
                2,
            )
        self.refresh()

    def refresh(self) -> None:
        """Take notice of what other processes have added."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file.stem not in self._shards and not file.name.startswith("."):
                self._open(file)

    def _open(self, file: Path) -> None:
        try:
            shard = Checkpoint(file)
            keys, items = (_texts(shard.metadata[name]) for name in ("keys", "items"))
            # Every record has a row of every array, as wide as the other shards' rows.
            rows = {name: (shard.dtype(name), shard.shapes[name][1:]) for name in shard}
            if keys and (
                any(shard.shapes[name][:1] != (len(keys),) for name in shard)
                or rows != (self._kind or rows)
                or not rows
            ):
                raise ValueError(f"arrays of {len(keys)} records were expected")
        except (UserError, KeyError, ValueError, RecursionError):
            raise UserError(f"{file} is damaged; delete it and run `python -m lorweb_jax.precompute` again") from None
        self._kind = rows if keys else self._kind
        self._shards[file.stem] = {name: _mapped(shard, name) for name in shard} if keys else {}
        self._rows |= {key: (file.stem, row) for row, key in enumerate(keys)}
        self.settled.update(items)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def gather(self, name: str, keys: Iterable[str]) -> np.ndarray:
        """Array `name` of these records, stacked [b, …]; KeyError for a key that isn't there."""
        rows = [self._rows[key] for key in keys]
        return np.stack([self._shards[shard][name][row] for shard, row in rows])

    def require_space(self, nbytes: int) -> None:
        """UserError unless so many bytes are free."""
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise UserError(
                f"{self.folder} has {free / 1e9:.2f} GB free, but what is missing there takes "
                f"{nbytes / 1e9:.2f} GB; make room or name another folder with --config.precomputed"
            )

    def holds(self, shard: str) -> bool:
        """Whether a shard of this name is there by now, whoever made it."""
        return (self.folder / f"{shard}.safetensors").is_file()

    def claimed(self, shard: str) -> contextlib.AbstractContextManager[bool]:
        """Whether this process may make the shard; False while another makes it."""
        return locked(self.folder / f".{shard}.lock", wait=False)

    def add(self, shard: str, items: Sequence[str], keys: Sequence[str], arrays: Mapping[str, np.ndarray]) -> None:
        """Publish a shard: records `keys`, one row of every array each. UserError if it can't be written."""
        for left in self.folder.glob(f".{shard}.*.safetensors*"):  # of a process that died
            left.unlink(missing_ok=True)
        temporary = self.folder / f".{shard}.{socket.gethostname()}-{os.getpid()}.safetensors"
        try:
            write(temporary, arrays, {"keys": json.dumps(list(keys)), "items": json.dumps(list(items))})
            os.replace(temporary, self.folder / f"{shard}.safetensors")
        except OSError as error:
            if not self.holds(shard):  # another process was faster, where locks don't reach
                raise _not_written(self.folder, error) from None
        finally:
            temporary.unlink(missing_ok=True)
        self._open(self.folder / f"{shard}.safetensors")


def shard_name(items: Sequence[str]) -> str:
    """The name of the shard that settles these items."""
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()[:24]


def _create(folder: Path, identity: Mapping[str, Any]) -> None:
    """identity.json, by whichever process comes first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".identity.lock", wait=True):
            if not (folder / IDENTITY).exists():
                write_json(folder / IDENTITY, dict(identity))
    except OSError as error:
        raise _not_written(folder, error) from None


def _texts(metadata: str) -> list[str]:
    """A list of texts from a shard's header; ValueError if it is none."""
    texts = json.loads(metadata)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a list of texts was expected")
    return texts


def _mapped(shard: Checkpoint, name: str) -> np.ndarray:
    """Read as it is used, by any number of processes at once."""
    return np.memmap(shard.path, shard.dtype(name), "r", shard.extent(name).offset, shard.shapes[name])


def _not_written(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"{folder} could not be written ({error.strerror}); make room, or name another folder with "
        "--config.precomputed, and run the same command again: what is there stays"
    )
