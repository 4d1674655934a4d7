"""FLUX weights in GGUF files, by the gguf package: their numbers are unpacked as they are read, block by block."""

import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import shown
from lorweb_jax.common.user_files import regular_file
from lorweb_jax.files.checkpoint import Checkpoint, Entry

MAGIC = b"GGUF"
_LONGEST = 1_000_000  # items of a list in the header; language models list their words there
_PLAIN = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
}


class Packed(NamedTuple):
    """Decodes one of ggml's quantised types, `kind`: blocks of `block` numbers in `size` bytes."""

    kind: int
    name: str
    block: int
    size: int

    def nbytes(self, count: int) -> int:
        return count // self.block * self.size

    def __call__(self, data: np.ndarray, first: int) -> np.ndarray:
        import gguf

        with np.errstate(all="ignore"):  # a damaged block may hold anything
            return gguf.dequantize(data.reshape(-1, self.size), gguf.GGMLQuantizationType(self.kind)).reshape(-1)


def read_gguf(path: str | Path) -> tuple[Checkpoint, str]:
    """(its tensors, in float32 where they are packed; the architecture that it names) of a GGUF file.

    Raises UserError if it is damaged, or packed in a way that the package can't unpack.
    """
    file = regular_file(path, "give a .gguf file")
    reader, architecture = _open(file)
    entries = {tensor.name: _entry(file, tensor) for tensor in reader.tensors}
    _require_apart(file, entries)
    return Checkpoint.of_entries(file, entries), architecture


def _open(file: Path):
    try:
        import gguf
    except ImportError:
        raise UserError(f"{file} is a GGUF file, which needs the package gguf; run pip install gguf") from None

    class Reader(gguf.GGUFReader):
        """Asks for nothing beyond the file's end, where the package would go on with nothing, for ever."""

        def _get(self, offset, dtype, count=1, override_order=None):
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it is cut short")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > _LONGEST:
                raise ValueError("a list in its header is too long")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        with np.errstate(all="ignore"):  # sizes that don't fit are refused by what follows
            reader = Reader(file)
            field = reader.get_field("general.architecture")
            return reader, str(field.contents()) if field else "unnamed"
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{file} is a damaged GGUF file ({' '.join(str(error).split())[:200]}); download it again"
        ) from None


def _entry(file: Path, tensor) -> Entry:
    from gguf import GGML_QUANT_SIZES

    kind, shape = tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape.tolist()))
    block, size = GGML_QUANT_SIZES[kind]
    if math.prod(shape) != tensor.n_elements or shape and shape[-1] % block:
        raise UserError(f"{file}: {shown(tensor.name)} is {list(shape)} in blocks of {block}; download it again")
    if kind.name in _PLAIN:
        return Entry(file, tensor.data_offset, np.dtype(_PLAIN[kind.name]), shape)
    decoder = Packed(int(kind), kind.name, block, size)
    try:
        decoder(np.zeros(size, np.uint8), 0)
    except NotImplementedError:
        raise UserError(
            f"{file} holds {shown(tensor.name)} in {kind.name}, which the gguf package can't unpack; give "
            "another file of the same model"
        ) from None
    return Entry(file, tensor.data_offset, np.dtype(np.float32), shape, decoder)


def _require_apart(file: Path, entries: dict[str, Entry]) -> None:
    """UserError where two tensors share bytes."""
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise UserError(f"{file} is damaged: {shown(name)} lies within {shown(before)}; download it again")
        if size := entry.nbytes(math.prod(entry.shape)):
            end, before = entry.offset + size, name
