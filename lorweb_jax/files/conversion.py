"""Tensors copied from files into files as a stream of small pieces, with checksums, and gone on with after a kill.

A file has the name NAME.partial until its last byte is on the disk, and is shorter than its header says until then:
nothing loads it by mistake. What is finished stands in a journal (journal.py). Reading, checksums and writing overlap.
"""

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import checked
from lorweb_jax.files.checkpoint import Checkpoint, Decoder, Extent, ahead
from lorweb_jax.files.journal import Finished, Journal, write_all
from lorweb_jax.files.safetensors_io import FORMAT, NAMES, Spec, header, require_space

ALGORITHM = "sha256"
JOURNAL = "journal.jsonl"
_CHUNK = 1 << 24  # bytes read, hashed and written at a time
_AHEAD = 3  # chunks read while others are written
_SYNC_BYTES = 1 << 29  # so much is written between two waits for the disk, which take place in the background

Files = Mapping[str, Mapping[str, Spec]]  # file name -> tensor -> what it is
Progress = Callable[[int, int, int], None]  # bytes that are finished, of how many, and how many of them just now


class Run(NamedTuple):
    """Bytes of a source file that follow one another in a tensor to be written: numbers of `dtype`, the first of them
    the `first` of their tensor, or what `decoder` makes numbers of."""

    extent: Extent
    dtype: np.dtype
    decoder: Decoder | None = None
    first: int = 0


def write_files(
    folder: Path,
    files: Files,
    runs: Callable[[str], Iterable[Run]],
    task: dict[str, Any],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write `files` into `folder`, each tensor from `runs(name)`; returns {tensor: checksum}.

    What an earlier call with the same `task` (source and settings) has finished there is kept. Raises UserError if
    the folder holds another task, another process works there, the disk is full (what is written is kept), or a
    value doesn't fit the dtype to be written.
    """
    with one_sentence_if_full(folder), closing(Journal(folder / JOURNAL, task)) as journal:
        writing = _Writing(folder, files, journal, progress)
        with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(2) as helpers:
            for file in files:
                writing.write(file, runs, readers, helpers)
    return {finished.tensor: finished.digest for finished in journal.finished}


class _Writing:
    def __init__(self, folder: Path, files: Files, journal: Journal, progress: Progress | None):
        self.folder, self.files, self.journal, self.progress = folder, files, journal, progress
        self.starts = {file: header(specs, FORMAT) for file, specs in files.items()}
        self.total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
        order = [(file, name) for file, (_, extents) in self.starts.items() for name in extents]
        journal.keep(self._intact(order))
        self.done = sum(files[file][name].nbytes for file, name in order[: len(journal.finished)])
        require_space(folder, self.total - self.done)

    def _intact(self, order: list[tuple[str, str]]) -> int:
        """How many of the journal's tensors are on the disk; those not known to be synced are read again."""
        for count, (finished, expected) in enumerate(zip(self.journal.finished, order)):
            file, name = expected
            path = next((path for path in (self.folder / file, self._partial(file)) if path.exists()), None)
            start, stop = self.starts[file][1][name]
            if finished[:2] != expected or path is None or path.stat().st_size < stop:
                return count
            if count >= self.journal.synced and checksum(Extent(path, start, stop - start)) != finished.digest:
                return count
        return len(self.journal.finished)

    def _partial(self, file: str) -> Path:
        return self.folder / f"{file}.partial"

    def write(self, file: str, runs: Callable[[str], Iterable[Run]], readers: Executor, helpers: Executor) -> None:
        """One file, from its first tensor that isn't finished; it then takes its name."""
        start, extents = self.starts[file]
        finished = [entry.tensor for entry in self.journal.finished if entry.file == file]
        if (self.folder / file).exists():
            if len(finished) == len(extents):
                return
            os.replace(self.folder / file, self._partial(file))
        with open(self._partial(file), "ab" if finished else "wb", buffering=0) as stream:
            if finished:
                stream.truncate(extents[finished[-1]][1])
            else:
                write_all(stream.fileno(), start)
            self._write_tensors(stream.fileno(), file, list(extents)[len(finished) :], runs, readers, helpers)
            os.fsync(stream.fileno())
        self.journal.mark_synced(len(self.journal.finished))
        self.journal.sync()
        os.replace(self._partial(file), self.folder / file)

    def _write_tensors(
        self,
        descriptor: int,
        file: str,
        todo: list[str],
        runs: Callable[[str], Iterable[Run]],
        readers: Executor,
        helpers: Executor,
    ) -> None:
        pieces = ((name, piece) for name in todo for piece in _pieces(runs(name), self.files[file][name]))
        loaded = ahead(readers, lambda item: (item[0], item[1].load()), pieces, _AHEAD)
        digest, written, sync, unsynced = hashlib.new(ALGORITHM), 0, _Sync(helpers, descriptor), 0
        for name, data in loaded:
            hashing = helpers.submit(digest.update, data)
            write_all(descriptor, data)
            hashing.result()
            written += data.nbytes
            self.done += data.nbytes
            if written == self.files[file][name].nbytes:
                self.journal.add(Finished(file, name, digest.hexdigest()))
                digest, written, unsynced = hashlib.new(ALGORITHM), 0, unsynced + written
                if (count := sync.finished()) is not None:
                    self.journal.mark_synced(count)
                if unsynced >= _SYNC_BYTES and sync.start(len(self.journal.finished)):
                    unsynced = 0
            if self.progress:
                self.progress(self.done, self.total, data.nbytes)
        sync.wait()


class _Sync:
    """Waits in the background for what is written to reach the disk."""

    def __init__(self, executor: Executor, descriptor: int):
        self._executor, self._descriptor = executor, descriptor
        self._running: Future | None = None
        self._count = 0

    def start(self, count: int) -> bool:
        """Unless one is running."""
        if self._running is None:
            self._running, self._count = self._executor.submit(os.fdatasync, self._descriptor), count
            return True
        return False

    def finished(self) -> int | None:
        """The count that was given at the start, once, when all written by then is on the disk."""
        if self._running is None or not self._running.done():
            return None
        self.wait()
        return self._count

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()
            self._running = None


class _Piece(NamedTuple):
    run: Run
    spec: Spec

    def load(self) -> np.ndarray:
        """uint8, as it will be written."""
        extent, dtype, decoder, first = self.run
        data = extent.read()
        if decoder:
            data = _cast(decoder(data, first), self.spec.dtype).view(np.uint8)
        elif dtype != self.spec.dtype:
            data = _cast(data.view(dtype), self.spec.dtype).view(np.uint8)
        return data


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # told below
        result = array.astype(dtype)
    # Of the dtypes that weights are stored in, float16 alone has a shorter range; its bits are quicker to look at.
    if dtype == np.float16 and ((result.view(np.uint16) & 0x7FFF) >= 0x7C00).any():
        lost = array[np.isinf(result) & np.isfinite(array)]
        if lost.size:
            raise UserError(f"the weight {lost[0]} is beyond the range of float16; convert to bfloat16 or float32")
    return result


def _pieces(runs: Iterable[Run], spec: Spec) -> Iterator[_Piece]:
    for (file, offset, nbytes), dtype, decoder, first in runs:
        block, numbers = (decoder.nbytes(decoder.block), decoder.block) if decoder else (dtype.itemsize, 1)
        chunk = max(_CHUNK // block, 1) * block
        for start in range(0, nbytes, chunk):
            extent = Extent(file, offset + start, min(chunk, nbytes - start))
            yield _Piece(Run(extent, dtype, decoder, first + start // block * numbers), spec)


def checksum(extent: Extent) -> str:
    digest = hashlib.new(ALGORITHM)
    for piece in _pieces([Run(extent, np.dtype(np.uint8))], Spec((extent.nbytes,), np.dtype(np.uint8))):
        digest.update(piece.load())
    return digest.hexdigest()


def record(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """What checksums.json says of files just written: counts, and of each tensor dtype, shape and checksum."""
    return {
        "algorithm": ALGORITHM,
        "bytes": checkpoint.nbytes,
        "count": len(checkpoint),
        "tensors": {
            name: {"dtype": NAMES[checkpoint.dtype(name)], "shape": list(shape), ALGORITHM: digests[name]}
            for name, shape in checkpoint.shapes.items()
        },
    }


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """checksums.json."""

    algorithm: Literal["sha256"]
    tensors: dict[str, dict[str, Any]]


def check(checkpoint: Checkpoint, recorded: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Read every tensor again; UserError if any is missing, added, or differs from what was recorded."""
    expected = checked(dict(recorded), _Recorded, f"the checksums of {checkpoint.path}").tensors

    def read(name: str) -> tuple[str, dict[str, Any]]:
        return name, {
            "dtype": NAMES[checkpoint.dtype(name)],
            "shape": list(checkpoint.shapes[name]),
            ALGORITHM: checksum(checkpoint.extent(name)),
        }

    found, done = {}, 0
    with ThreadPoolExecutor(2) as readers:
        for name, facts in ahead(readers, read, checkpoint, _AHEAD):
            found[name] = facts
            size = checkpoint.extent(name).nbytes
            done += size
            if progress:
                progress(done, checkpoint.nbytes, size)
    if wrong := sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name)):
        raise UserError(
            f"{len(wrong)} of {len(expected)} tensors in {checkpoint.path} are not those that were written "
            f"({wrong[0]} first); convert or copy them again"
        )


@contextmanager
def one_sentence_if_full(folder: Path):
    """A full disk becomes a UserError that says what is kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk is full ({error.strerror}); what is written so far is kept in {folder}: make room "
            "and give the same command again, or remove that folder"
        ) from None
