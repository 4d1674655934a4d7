"""safetensors files read tensor by tensor, and written as a stream: memory holds one tensor at a time.

The format is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. Reading it here
(rather than by the safetensors package) gives byte ranges of a tensor, bfloat16 as numpy, and one-sentence errors.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lorweb_jax.errors import UserError

_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_STANDARD = ("diffusion_pytorch_model", "model")  # the stems that diffusers and transformers write
_LONGEST_HEADER = 100_000_000


class Spec(NamedTuple):
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


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

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tensor, or its rows start..stop along the leading axis, read from the disk now."""
        file, offset, dtype, shape = self._entries[name]
        if stop is None and start == 0:
            rows = shape
        else:
            rows = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        # Read, not mapped: mapped pages would count as this process's memory while 24 GB stream through it.
        array = np.fromfile(file, dtype, math.prod(rows), offset=offset)
        if array.size != math.prod(rows):
            raise UserError(f"{file} became shorter while it was read; leave it alone until this command ends")
        return array.reshape(rows)

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


@contextmanager
def replacing(path: str | Path):
    """A temporary path beside `path`; it takes `path`'s place if the body ends well and is removed if not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays that are in memory; `path` appears when all is written."""
    write_stream(path, {name: Spec(array.shape, np.dtype(array.dtype)) for name, array in tensors.items()},
                 lambda name: np.asarray(tensors[name]), metadata)


def write_stream(path: str | Path, specs: Mapping[str, Spec], produce: Callable[[str], np.ndarray],
                 metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors that `produce(name)` makes one at a time; `path` appears when all is written."""
    path = Path(path)
    # Wide dtypes first keeps every tensor aligned, as the safetensors package does.
    names = sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + specs[name].nbytes
        header[name] = {"dtype": _NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        _require_space(path, end)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                array = np.asarray(produce(name), specs[name].dtype, order="C")
                if array.shape != tuple(specs[name].shape):
                    raise ValueError(f"{name}: produced {array.shape}, announced {specs[name].shape}")
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())


def write_sharded(folder: str | Path, stem: str, specs: Mapping[str, Spec], produce: Callable[[str], np.ndarray],
                  max_shard_bytes: int = 10_000_000_000) -> list[Path]:
    """Write `folder/stem.safetensors`, or shards `stem-00001-of-0000N.safetensors` and their index, written last.

    Returns the files, in order.
    """
    folder = Path(folder)
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    if len(shards) == 1:
        path = folder / f"{stem}.safetensors"
        write_stream(path, specs, produce, {"format": "pt"})
        return [path]
    files = [folder / f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, shard in zip(files, shards):
        write_stream(file, shard, produce, {"format": "pt"})
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
             "weight_map": {name: file.name for file, shard in zip(files, shards) for name in sorted(shard)}}
    write_json(folder / f"{stem}.safetensors.index.json", index)
    return files


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON as diffusers does (indented, one newline at the end), atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. UserError if the file is missing or holds something else."""
    path = Path(path)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder that holds it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a JSON {type(data).__name__}, expected an object; download it again")
    return data


def _require_space(path: Path, nbytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise UserError(f"{path.parent} has {free / 1e9:.2f} GB free, but {path.name} needs {nbytes / 1e9:.2f} GB; "
                        "make room or write elsewhere")


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
            dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
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
