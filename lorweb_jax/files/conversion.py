"""Tensors copied from files into files as a stream of small pieces, with checksums.

A file takes its name when its last byte is on the disk; finished.json then lists it with its tensors' checksums, and
the same conversion, given again after a kill, keeps it. Reading, checksums and writing overlap.
"""

import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.locks import locked
from lorweb_jax.common.outputs import replacing
from lorweb_jax.common.schema import checked, read_json
from lorweb_jax.files.checkpoint import Checkpoint, Decoder, Extent, ahead
from lorweb_jax.files.safetensors_io import FORMAT, NAMES, Spec, header, require_space, write_json

ALGORITHM = "sha256"
FINISHED = "finished.json"
_CHUNK = 1 << 24  # bytes read, hashed and written at a time
_AHEAD = 3  # chunks read while others are written

Files = Mapping[str, Mapping[str, Spec]]  # file name -> tensor -> what it is
Progress = Callable[[int, int], None]  # bytes that are done, of how many; first with those that an earlier call did


class Run(NamedTuple):
    """Contiguous bytes of a source tensor: numbers of `dtype`, or what `decoder` decodes; `first` is the index of the
    first one in the source tensor."""

    extent: Extent
    dtype: np.dtype
    decoder: Decoder | None = None
    first: int = 0


@dataclasses.dataclass(frozen=True)
class _Finished:
    """finished.json: what is converted and how, and the files that are written, {file: {tensor: checksum}}."""

    task: dict[str, Any]
    files: dict[str, dict[str, str]]


def write_files(
    folder: Path,
    files: Files,
    runs: Callable[[str], Iterable[Run]],
    task: dict[str, Any],
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write `files` into `folder`, each tensor the concatenation of `runs(name)`; returns {tensor: checksum}.

    Files that an earlier call with the same `task` (source and settings, what JSON can hold) has finished are kept.
    Raises UserError if the folder holds files of another task, another process works there, the disk is full, or a
    value doesn't fit the dtype to be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with one_sentence_if_full(folder), locked(folder / ".lock", wait=False) as ours:
        if not ours:
            raise UserError(f"another process is writing {folder}; wait for it, or end it")
        finished = _finished(folder, files, task)
        for path in {*folder.glob("*.safetensors*"), *folder.glob("*.partial")}:  # of a process that was killed
            if path.name not in finished:
                path.unlink()
        total = sum(spec.nbytes for specs in files.values() for spec in specs.values())
        done = sum(spec.nbytes for file in finished for spec in files[file].values())
        require_space(folder, total - done)
        write_json(folder / FINISHED, {"task": task, "files": finished})

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress:
                progress(done, total)

        advance(0)
        with ThreadPoolExecutor(2) as readers, ThreadPoolExecutor(1) as hasher:
            for file in files:
                if file not in finished:
                    finished[file] = _write(folder / file, files[file], runs, advance, readers, hasher)
                    write_json(folder / FINISHED, {"task": task, "files": finished})
    return {name: digest for digests in finished.values() for name, digest in digests.items()}


def _finished(folder: Path, files: Files, task: dict[str, Any]) -> dict[str, dict[str, str]]:
    """{file: {tensor: checksum}} of the files that an earlier call has finished; UserError if of another task."""
    if not (folder / FINISHED).exists():
        return {}
    earlier = read_json(folder / FINISHED, _Finished, remedy=f"remove {folder} to begin anew")
    different = [name for name in task if earlier.task.get(name) != task[name]]
    if different and earlier.files:
        raise UserError(
            f"{folder} holds an unfinished conversion with another {different[0]}; give the earlier "
            "command again to go on with it, or remove that folder to begin anew"
        )
    return {
        file: digests
        for file, digests in earlier.files.items()
        if file in files and digests.keys() == files[file].keys() and _size(folder / file) == _size_of(files[file])
    }


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _size_of(specs: Mapping[str, Spec]) -> int:
    """Bytes of the file that holds these tensors."""
    return len(header(specs, FORMAT)[0]) + sum(spec.nbytes for spec in specs.values())


def _write(
    file: Path,
    specs: Mapping[str, Spec],
    runs: Callable[[str], Iterable[Run]],
    advance: Callable[[int], None],
    readers: Executor,
    hasher: Executor,
) -> dict[str, str]:
    """One file, which takes its name at the end; {tensor: checksum}."""
    start, extents = header(specs, FORMAT)
    digests = {name: hashlib.new(ALGORITHM) for name in extents}
    pieces = ((name, piece) for name in extents for piece in _pieces(runs(name), specs[name]))
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        stream.write(start)
        for name, data in ahead(readers, lambda item: (item[0], item[1].load()), pieces, _AHEAD):
            hashing = hasher.submit(digests[name].update, data)
            stream.write(data)
            hashing.result()
            advance(data.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    return {name: digest.hexdigest() for name, digest in digests.items()}


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
    with np.errstate(over="ignore"):  # refused below
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
        digest.update(piece.load().data)
    return digest.hexdigest()


def record(checkpoint: Checkpoint, digests: Mapping[str, str]) -> dict[str, Any]:
    """The contents of checksums.json: counts, and dtype, shape and checksum of each tensor."""
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

    actual, done = {}, 0
    if progress:
        progress(0, checkpoint.nbytes)
    with ThreadPoolExecutor(2) as readers:
        for name, facts in ahead(readers, read, checkpoint, _AHEAD):
            actual[name] = facts
            done += checkpoint.extent(name).nbytes
            if progress:
                progress(done, checkpoint.nbytes)
    if wrong := sorted(name for name in actual.keys() | expected if actual.get(name) != expected.get(name)):
        raise UserError(
            f"{len(wrong)} of {len(expected)} tensors in {checkpoint.path} are not those that were written "
            f"({wrong[0]} first); convert or copy them again"
        )


@contextmanager
def one_sentence_if_full(folder: Path):
    """A full disk becomes a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"the disk is full ({error.strerror}); finished files are kept in {folder}: make room "
            "and give the same command again, or remove that folder"
        ) from None
