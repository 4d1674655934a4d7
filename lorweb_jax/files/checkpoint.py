"""safetensors checkpoints read tensor by tensor, or by rows of one.

Reading the format here (rather than by the safetensors package) gives byte ranges of a tensor, bfloat16 as numpy, and
one-sentence errors.
"""

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.finite import require_finite
from lorweb_jax.common.schema import INDEX_BYTES, Between, json_value, read_json, shown
from lorweb_jax.common.user_files import by_beginning, cannot_be_read, inside, regular_file
from lorweb_jax.files.safetensors_io import DTYPES, FLOATS, NAMES

_STANDARD = ("diffusion_pytorch_model", "model")  # the stems that diffusers and transformers write
_LONGEST_HEADER = 100_000_000  # the reference's limit
# What files of other dtypes are usually called.
_OTHERS = {
    "F4": " (MXFP4, NVFP4)",
    "F8_E8M0": " (scales of MXFP4 and MXFP8)",
    "F6_E2M3": " (MXFP6)",
    "F6_E3M2": " (MXFP6)",
}


class Extent(NamedTuple):
    """Bytes that follow one another in a file."""

    file: Path
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """uint8 [nbytes], from the disk now. UserError if the file no longer holds them."""
        # Read, not mapped: mapped pages would count as this process's memory while 24 GB stream through it.
        try:
            array = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.offset)
        except OSError as error:
            raise cannot_be_read(self.file, error) from None
        if array.size != self.nbytes:
            raise UserError(f"{self.file} became shorter while it was read; leave it alone until this command ends")
        return array


class Decoder(Protocol):
    """Decodes numbers that are packed, or stored with a scale."""

    @property
    def name(self) -> str:
        """Of the way they are stored, for a person."""

    @property
    def block(self) -> int:
        """How many numbers can only be decoded together."""

    def nbytes(self, count: int) -> int:
        """Bytes that `count` numbers take, a multiple of `block`."""

    def __call__(self, data: np.ndarray, first: int) -> np.ndarray:
        """uint8 of whole blocks -> numbers [count] of the entry's dtype; first: index of the first in its tensor."""


class Entry(NamedTuple):
    """A tensor in a file; dtype is that of the numbers that are read."""

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    decoder: Decoder | None = None

    def nbytes(self, count: int) -> int:
        """Bytes of `count` numbers as they are stored."""
        return self.decoder.nbytes(count) if self.decoder else count * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class _Index:
    """NAME.safetensors.index.json."""

    weight_map: Annotated[dict[str, str], Between(1, math.inf)]  # tensor -> file


class Checkpoint:
    """A safetensors file, or a folder with one (sharded with an index, or single). Headers are read, data is not.

    Raises UserError if the file or a shard is missing, cut short, or not safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files, weight_map = _find(self.path)
        self.files = files
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}
        for file in files:
            entries, metadata = _read_header(file)
            if repeated := entries.keys() & self._entries.keys():
                raise UserError(f"{file} holds {min(repeated)}, as another shard does; download the folder again")
            self._entries |= entries
            self.metadata |= metadata
        if weight_map is not None and (absent := sorted(set(weight_map) - set(self._entries))):
            raise UserError(
                f"the index in {self.path} names {absent[0]}, which no shard holds "
                f"({len(absent)} such); download the folder again"
            )

    @classmethod
    def of_entries(cls, file: Path, entries: Mapping[str, Entry]) -> "Checkpoint":
        """The tensors of a file in another format, as its reader lists them."""
        checkpoint = cls.__new__(cls)
        checkpoint.path, checkpoint.files, checkpoint.metadata, checkpoint._entries = file, [file], {}, dict(entries)
        return checkpoint

    def of(self, entries: Mapping[str, Entry]) -> "Checkpoint":
        """The same files with other entries: some of them, under other names, or decoded."""
        other = copy.copy(self)
        other._entries = dict(entries)
        return other

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def nbytes(self) -> int:
        """On the disk."""
        return sum(entry.nbytes(math.prod(entry.shape)) for entry in self._entries.values())

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype, or other way of storing."""
        names = [entry.decoder.name if entry.decoder else entry.dtype.name for entry in self._entries.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    def require_floats(self, ignored: Collection[str] = ()) -> None:
        """UserError for a tensor of whole numbers, truth values or complex numbers where weights are expected."""
        for name, entry in self._entries.items():
            if entry.dtype not in FLOATS and name not in ignored:
                raise UserError(
                    f"{entry.file} holds {NAMES[entry.dtype]} in {shown(name)}, floating-point weights "
                    "were expected; give a file that isn't packed or quantised"
                )

    def below(self, prefix: str) -> "Checkpoint":
        """The tensors whose names begin with `prefix`, without it."""
        return self.of(
            {name.removeprefix(prefix): entry for name, entry in self._entries.items() if name.startswith(prefix)}
        )

    def extent(self, name: str, start: int = 0, stop: int | None = None) -> Extent:
        """Where the tensor, or its rows start..stop along the leading axis, lies on the disk."""
        entry = self._entries[name]
        if stop is None and start == 0:
            return Extent(entry.file, entry.offset, entry.nbytes(math.prod(entry.shape)))
        row = entry.nbytes(math.prod(entry.shape[1:]))
        return Extent(
            entry.file, entry.offset + start * row, len(range(*slice(start, stop).indices(entry.shape[0]))) * row
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows start..stop along the leading axis, read from the disk now.

        UserError if it is not finite.
        """
        file, _, dtype, shape, decoder = self._entries[name]
        data = self.extent(name, start, stop).read()
        array = decoder(data, start * math.prod(shape[1:])) if decoder else data.view(dtype)
        require_finite(array, f"{file}: {name}", "download the file again, or take an earlier one")
        return array.reshape(shape if stop is None and start == 0 else (-1, *shape[1:]))

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_all(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a small file by name, and the file's metadata."""
    checkpoint = Checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint}, checkpoint.metadata


def ahead(executor: Executor, load: Callable[[Any], Any], items: Iterable[Any], count: int) -> Iterator[Any]:
    """load(item) of each item in order, `count` of them begun before they are asked for."""
    items, waiting = iter(items), deque()
    try:
        while True:
            while len(waiting) <= count and (item := next(items, None)) is not None:
                waiting.append(executor.submit(load, item))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _find(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """(files, index's weight_map or None) of a checkpoint."""
    if not path.is_dir():
        return [regular_file(path, "give a .safetensors file or a folder that holds one")], None
    indices = _prefer_standard(sorted(path.glob("*.safetensors.index.json")))
    if len(indices) == 1:
        weight_map = read_json(indices[0], _Index, limit=INDEX_BYTES).weight_map
        return [inside(path, name, indices[0]) for name in sorted(set(weight_map.values()))], weight_map
    files = _prefer_standard(sorted(path.glob("*.safetensors")))
    if len(files) == 1 and not indices:
        return files, None
    names = ", ".join(file.name for file in indices + files) or "no .safetensors file"
    raise UserError(
        f"{path} holds {names}; expected one .safetensors file or shards with one index: "
        "name the file or the right folder"
    )


def _prefer_standard(paths: list[Path]) -> list[Path]:
    """The file that libraries load by default, where variants (fp16, ema) lie beside it."""
    names = {f"{stem}.safetensors{end}" for stem in _STANDARD for end in ("", ".index.json")}
    return [path for path in paths if path.name in names] or paths


def _read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of one file. Nothing that the header says is used before it is checked."""
    size = regular_file(file, "download it, or give another file").stat().st_size
    begins = b""
    try:
        with open(file, "rb") as stream:
            begins = stream.read(64)
            stream.seek(8)
            length = int.from_bytes(begins[:8], "little")
            if not size:
                raise ValueError("it is empty")
            if size < 8 or not stream.peek(1).startswith(b"{") or length > _LONGEST_HEADER:
                raise ValueError("it does not begin with a header")
            if length > size - 8:
                raise UserError(f"{file} is cut short within its header ({size} bytes); download it again")
            text = stream.read(length)
        entries, metadata, end = _entries(file, json_value(text.decode()), 8 + length)
    except OSError as error:
        raise cannot_be_read(file, error) from None
    except ValueError as error:
        if what := by_beginning(begins):
            raise UserError(f"{file} is not a safetensors file, but {what}") from None
        raise UserError(
            f"{file} is not a safetensors file ({error}); give a .safetensors file, or convert a .ckpt or "
            ".bin with its own tools first"
        ) from None
    if end > size:
        raise UserError(f"{file} is cut short: {size} bytes found, {end} expected; download it again")
    if end < size:
        raise UserError(f"{file} has {size} bytes, {size - end} more than its tensors take; download it again")
    return entries, metadata


def _entries(file: Path, header: dict[str, Any], start: int) -> tuple[dict[str, Entry], dict[str, str], int]:
    """(entries, metadata, where the data ends) of a header that is followed by the data at `start`; ValueError, in
    words for a person, unless the tensors follow one another without a gap and each is as long as its shape says."""
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    extents = {name: _extent(name, entry) for name, entry in header.items()}
    entries, end = {}, 0
    for name, (first, last) in sorted(extents.items(), key=lambda item: item[1]):
        dtype, shape = header[name]["dtype"], header[name]["shape"]
        if first != end:
            raise ValueError(f"{shown(name)} begins at byte {first}, and the tensor before it ends at {end}")
        if dtype not in DTYPES:
            raise UserError(
                f"{file} holds numbers of type {dtype}{_OTHERS.get(dtype, '')} in {shown(name)}, which are "
                f"not known here; known are {', '.join(DTYPES)}: give the file in one of these"
            )
        # 2^63: what a file or an array can hold; sizes of 0 don't make it less.
        if len(shape) > 64 or math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize >= 2**63:
            raise ValueError(f"{shown(name)} has the shape {shown(shape)}")
        if last - first != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"the size of {shown(name)} does not agree with its shape")
        entries[name] = Entry(file, start + first, DTYPES[dtype], tuple(shape))
        end = last
    return {name: entries[name] for name in header}, metadata, start + end


def _extent(name: str, entry: Any) -> tuple[int, int]:
    """(first, last) byte of a header's entry, whose fields have the right types; ValueError if not."""
    try:
        dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = [*shape, first, last]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of {shown(name)} has no dtype, shape and data_offsets") from None
    if not isinstance(dtype, str) or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
        raise ValueError(f"the entry of {shown(name)} holds {shown(entry)}")
    return first, last
