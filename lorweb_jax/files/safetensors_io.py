"""safetensors files written as a stream (memory holds one tensor at a time), and JSON files beside them.

The format is an 8-byte length, a JSON header {name: {dtype, shape, data_offsets}}, then the data. checkpoint.py reads.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.finite import require_finite
from lorweb_jax.common.outputs import replacing

# safetensors' names of dtypes, and back.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "C64": np.complex64,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = {DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")}
FORMAT = {"format": "pt"}  # the metadata that diffusers and transformers ask for


class Spec(NamedTuple):
    """Shape and dtype of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays that are in memory; `path` appears when all is written. UserError if one is not finite."""
    for name, array in tensors.items():
        require_finite(
            np.asarray(array),
            f"{name}, as it would be written to {path},",
            "nothing is written: give finite numbers, or write float32 if they are too large for less",
        )
    write_stream(
        path,
        {name: Spec(array.shape, np.dtype(array.dtype)) for name, array in tensors.items()},
        lambda name: np.asarray(tensors[name]),
        metadata,
    )


def header(
    specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """(how a file of these tensors begins, {name: (start, stop)} of each in the file, in the file's order)."""
    # Wide dtypes first keeps every tensor aligned, as the safetensors package does.
    names = sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end, extents = 0, {}
    for name in names:
        extents[name] = end, end + specs[name].nbytes
        end += specs[name].nbytes
        table[name] = {
            "dtype": NAMES[np.dtype(specs[name].dtype)],
            "shape": list(specs[name].shape),
            "data_offsets": list(extents[name]),
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return start, {name: (len(start) + first, len(start) + last) for name, (first, last) in extents.items()}


def write_stream(
    path: str | Path,
    specs: Mapping[str, Spec],
    produce: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors that `produce(name)` makes one at a time; `path` appears when all is written."""
    path = Path(path)
    start, extents = header(specs, metadata)
    with replacing(path) as temporary:
        require_space(path, sum(spec.nbytes for spec in specs.values()))
        with open(temporary, "wb") as file:
            file.write(start)
            for name in extents:
                array = np.asarray(produce(name), specs[name].dtype, order="C")
                if array.shape != tuple(specs[name].shape):
                    raise ValueError(f"{name}: produced {array.shape}, announced {specs[name].shape}")
                file.write(array.reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())


def write_sharded(
    folder: str | Path,
    stem: str,
    specs: Mapping[str, Spec],
    produce: Callable[[str], np.ndarray],
    max_shard_bytes: int = 10_000_000_000,
) -> list[Path]:
    """Write `folder/stem.safetensors`, or shards `stem-00001-of-0000N.safetensors` and their index, written last.

    Returns the files, in order.
    """
    folder = Path(folder)
    shards = shards_of(stem, specs, max_shard_bytes)
    for name, shard in shards.items():
        write_stream(folder / name, shard, produce, FORMAT)
    if len(shards) > 1:
        write_json(folder / f"{stem}.safetensors.index.json", index_of(shards))
    return [folder / name for name in shards]


def shards_of(stem: str, specs: Mapping[str, Spec], max_shard_bytes: int) -> dict[str, dict[str, Spec]]:
    """{file name: its tensors}: one file, or as many of at most this size as are needed."""
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}


def index_of(shards: Mapping[str, Mapping[str, Spec]]) -> dict[str, Any]:
    """What the index of these shards holds."""
    return {
        "metadata": {"total_size": sum(spec.nbytes for shard in shards.values() for spec in shard.values())},
        "weight_map": {name: file for file, shard in shards.items() for name in sorted(shard)},
    }


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON as diffusers does (indented, one newline at the end), atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def require_space(path: Path, nbytes: int) -> None:
    """UserError unless so many bytes are free where `path` will be written."""
    free = shutil.disk_usage(path.parent).free
    if nbytes > free:
        raise UserError(
            f"{path.parent} has {free / 1e9:.2f} GB free, but {path.name} needs {nbytes / 1e9:.2f} GB; "
            "make room or write elsewhere"
        )
