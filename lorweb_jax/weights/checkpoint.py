"""safetensors checkpoints read tensor by tensor, or by rows of one.

Reading the format here (rather than by the safetensors package) gives byte ranges of a tensor, bfloat16 as numpy, and
one-sentence errors.
"""

import copy
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.errors import UserError
from lorweb_jax.weights.safetensors_io import DTYPES, read_json

_STANDARD = ("diffusion_pytorch_model", "model")  # the stems that diffusers and transformers write
_LONGEST_HEADER = 100_000_000


class Extent(NamedTuple):
    """Bytes that follow one another in a file."""

    file: Path
    offset: int
    nbytes: int

    def read(self) -> np.ndarray:
        """uint8 [nbytes], from the disk now. UserError if the file no longer holds them."""
        # Read, not mapped: mapped pages would count as this process's memory while 24 GB stream through it.
        array = np.fromfile(self.file, np.uint8, self.nbytes, offset=self.offset)
        if array.size != self.nbytes:
            raise UserError(f"{self.file} became shorter while it was read; leave it alone until this command ends")
        return array


class _Entry(NamedTuple):
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A safetensors file, or a folder with one (sharded with an index, or single). Headers are read, data is not.

    Raises UserError if the file or a shard is missing, cut short, or not safetensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        files, weight_map = _find(self.path)
        self.files = files
        self.metadata: dict[str, str] = {}
        self._entries: dict[str, _Entry] = {}
        for file in files:
            entries, metadata = _read_header(file)
            if repeated := entries.keys() & self._entries.keys():
                raise UserError(f"{file} holds {min(repeated)}, as another shard does; download the folder again")
            self._entries |= entries
            self.metadata |= metadata
        if weight_map is not None and (absent := sorted(set(weight_map) - set(self._entries))):
            raise UserError(f"the index in {self.path} names {absent[0]}, which no shard holds "
                            f"({len(absent)} such); download the folder again")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self._entries.values())

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype."""
        names = [entry.dtype.name for entry in self._entries.values()]
        return {name: names.count(name) for name in sorted(set(names))}

    def without_prefix(self, prefix: str) -> "Checkpoint":
        """The same tensors, their names without `prefix`, which all of them must have."""
        renamed = copy.copy(self)
        renamed._entries = {name.removeprefix(prefix): entry for name, entry in self._entries.items()}
        return renamed

    def extent(self, name: str, start: int = 0, stop: int | None = None) -> Extent:
        """Where the tensor, or its rows start..stop along the leading axis, lies on the disk."""
        file, offset, dtype, shape = self._entries[name]
        if stop is None and start == 0:
            return Extent(file, offset, math.prod(shape) * dtype.itemsize)
        row = math.prod(shape[1:]) * dtype.itemsize
        return Extent(file, offset + start * row, len(range(*slice(start, stop).indices(shape[0]))) * row)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows start..stop along the leading axis, read from the disk now."""
        dtype, shape = self._entries[name][2:]
        array = self.extent(name, start, stop).read().view(dtype)
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
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give a .safetensors file or a folder that holds one")
    indices = _prefer_standard(sorted(path.glob("*.safetensors.index.json")))
    if len(indices) == 1:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{indices[0]} has no weight_map; download it again")
        return [path / name for name in sorted(set(weight_map.values()))], weight_map
    files = _prefer_standard(sorted(path.glob("*.safetensors")))
    if len(files) == 1 and not indices:
        return files, None
    found = ", ".join(file.name for file in indices + files) or "no .safetensors file"
    raise UserError(f"{path} holds {found}; expected one .safetensors file or shards with one index: "
                    "name the file or the right folder")


def _prefer_standard(paths: list[Path]) -> list[Path]:
    """The file that libraries load by default, where variants (fp16, ema) lie beside it."""
    names = {f"{stem}.safetensors{end}" for stem in _STANDARD for end in ("", ".index.json")}
    return [path for path in paths if path.name in names] or paths


def _read_header(file: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Entries and metadata of one file, checked against its size."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_LONGEST_HEADER, size - 8) and not stream.peek(1).startswith(b"{"):
                raise ValueError("it does not begin with a header")
            text = stream.read(length)
        if len(text) < length:
            raise UserError(f"{file} is cut short within its header ({size} bytes); download it again")
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {}
        end = 0
        for name, entry in header.items():
            dtype, shape, (start, stop) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            if stop - start != math.prod(shape) * dtype.itemsize or start < 0:
                raise ValueError(f"the size of {name} does not agree with its shape")
            entries[name] = _Entry(file, 8 + length + start, dtype, shape)
            end = max(end, 8 + length + stop)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; download it, or give another file") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}); give a .safetensors file, or convert a .ckpt, "
                        ".bin or .gguf with its own tools first") from None
    if end > size:
        raise UserError(f"{file} is cut short: {size} bytes found, {end} expected; download it again")
    return entries, metadata
