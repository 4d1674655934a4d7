"""fp8 weights with their scales: a weight's numbers are its fp8 numbers times what stands beside it.

ComfyUI's files write `X.scale_weight` (and a marker `scaled_fp8`), others `X.weight_scale`: one number, or one for each
row. `X.scale_input` and `X.input_scale` are for products in fp8 and change no weight.
"""

import json
import math
from typing import NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import parse_json, shown
from lorweb_jax.files.checkpoint import Checkpoint, Entry
from lorweb_jax.files.safetensors_io import DTYPES, FLOATS

_SCALES = (".scale_weight", ".weight_scale")
_PASSED_OVER = (".scale_input", ".input_scale", ".comfy_quant")
MARKER = "scaled_fp8"
# The header's and each layer's note of how it is stored, in newer ComfyUI files.
_HEADER, _NOTE = "_quantization_metadata", ".comfy_quant"
_FORMATS = ("float8_e4m3fn", "float8_e5m2")


class Scaled(NamedTuple):
    """Decodes numbers of `stored`; scale float32 [1], or [o] for rows of `row` numbers."""

    stored: np.dtype
    scale: np.ndarray
    row: int

    @property
    def name(self) -> str:
        return f"scaled {self.stored.name}"

    @property
    def block(self) -> int:
        return 1 if self.scale.size == 1 else self.row

    def nbytes(self, count: int) -> int:
        return count * self.stored.itemsize

    def __call__(self, data: np.ndarray, first: int) -> np.ndarray:
        numbers = data.view(self.stored).astype(np.float32)
        if self.scale.size == 1:
            return numbers * self.scale
        rows = self.scale[first // self.row : first // self.row + numbers.size // self.row]
        return (numbers.reshape(-1, self.row) * rows[:, None]).reshape(-1)


def unscaled(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights without their scales, float32 where there was one; what has no scales is returned as it is.

    Raises UserError for scales that belong to no weight, aren't finite and above 0, or are of blocks.
    """
    _check_notes(checkpoint)
    scales = {name: name.removesuffix(end) + ".weight" for name in checkpoint for end in _SCALES if name.endswith(end)}
    beside = {name for name in checkpoint if name == MARKER or name.endswith(_PASSED_OVER)}
    if not scales and not beside:
        return checkpoint
    decoders: dict[str, Scaled] = {}
    for name, weight in scales.items():
        if weight not in checkpoint:
            raise UserError(
                f"{checkpoint.path} holds the scale {shown(name)}, but no {shown(weight)}; download it again"
            )
        if weight in decoders:
            raise UserError(f"{checkpoint.path} holds two scales of {shown(weight)}; remove one of them")
        decoders[weight] = _decoder(checkpoint, name, weight)
    return checkpoint.of(
        {
            name: _with(entry, decoders.get(name))
            for name, entry in checkpoint.entries.items()
            if name not in scales and name not in beside
        }
    )


def _with(entry: Entry, decoder: Scaled | None) -> Entry:
    return entry if decoder is None else entry._replace(dtype=np.dtype(np.float32), decoder=decoder)


def _decoder(checkpoint: Checkpoint, name: str, weight: str) -> Scaled:
    shape, stored = checkpoint.shapes[weight], checkpoint.dtype(weight)
    if stored not in FLOATS or checkpoint.dtype(name) not in FLOATS:
        raise UserError(
            f"{checkpoint.path} holds {shown(weight)} in {stored.name} with a scale in "
            f"{checkpoint.dtype(name).name}; scales are known here for fp8 weights: give the bfloat16 file"
        )
    scale = checkpoint.read(name).astype(np.float32).reshape(-1)
    if checkpoint.shapes[name] not in ((), (1,), (1, 1), shape[:1], (*shape[:1], 1)):
        raise UserError(
            f"{checkpoint.path}: the scale {shown(name)} is {list(checkpoint.shapes[name])} for a weight "
            f"{list(shape)}; one number or one a row was expected: give the bfloat16 file"
        )
    if not (np.isfinite(scale) & (scale > 0)).all():
        raise UserError(
            f"{checkpoint.path}: the scale {shown(name)} holds "
            f"{scale[~(np.isfinite(scale) & (scale > 0))][0]}, expected finite numbers above 0; download "
            "it again"
        )
    return Scaled(stored, scale, math.prod(shape[1:]))


def _check_notes(checkpoint: Checkpoint) -> None:
    """UserError where a file says that layers are stored in another way than fp8."""
    notes = {
        name: checkpoint.read(name).tobytes().decode(errors="replace")
        for name in checkpoint
        if name.endswith(_NOTE) and checkpoint.dtype(name) == DTYPES["U8"]
    }
    if _HEADER in checkpoint.metadata:
        header = parse_json(checkpoint.metadata[_HEADER], f"{checkpoint.path}: {_HEADER}")
        layers = header.get("layers") if isinstance(header, dict) else None
        notes |= {name: json.dumps(note) for name, note in (layers if isinstance(layers, dict) else {}).items()}
    for name, text in notes.items():
        note = parse_json(text, f"{checkpoint.path}: {name}")
        kind = note.get("format") if isinstance(note, dict) else None
        if kind not in _FORMATS:
            raise UserError(
                f"{checkpoint.path} says that {shown(name.removesuffix(_NOTE))} is stored as "
                f"{shown(kind)}, which isn't read here ({', '.join(_FORMATS)} are); give the bfloat16 file"
            )
