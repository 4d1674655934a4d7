"""Layer names in adapter files (diffusers', block index included) and our stacked paths, both ways."""

import re

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.record import LAYERS

_NAMES = {layer.path: layer.names["diffusers"].key for layer in LAYERS if layer.stack}
_PATHS = {name: path for path, name in _NAMES.items()}


def layer_name(path: str, block: int) -> str:
    """ "transformer_blocks.attn.to_out_0", 3 -> "transformer_blocks.3.attn.to_out.0".

    The path itself, of a layer that the model doesn't have.
    """
    return _NAMES.get(path, path).replace("{l}", str(block))


def split_layer_name(name: str) -> tuple[str, int] | None:
    """Inverse of `layer_name`; None for a layer that is not inside the blocks."""
    # One spelling a block: "00" would be block 0 a second time.
    match = re.fullmatch(r"(\w+)\.(0|[1-9][0-9]{0,3})(\..+)", name)
    path = _PATHS.get(f"{match[1]}.{{l}}{match[3]}") if match else None
    return None if path is None else (path, int(match[2]))


def stack_blocks(path: str, blocks: dict[int, np.ndarray], what: str) -> np.ndarray:
    """{block: array} -> [l, …]; UserError if a block between is missing or blocks have different shapes."""
    if max(blocks) >= len(blocks):
        absent = next(block for block in range(len(blocks)) if block not in blocks)
        raise UserError(
            f"{what} of {layer_name(path, absent)} is missing, but later blocks have one; download the file again"
        )
    arrays = [blocks[block] for block in range(len(blocks))]
    if odd := [block for block, array in enumerate(arrays) if array.shape != arrays[0].shape]:
        raise UserError(
            f"{what} of {layer_name(path, odd[0])} is {list(arrays[odd[0]].shape)}, but "
            f"{list(arrays[0].shape)} in {layer_name(path, 0)}; equal blocks need equal shapes"
        )
    if odd := [block for block, array in enumerate(arrays) if array.dtype != arrays[0].dtype]:
        raise UserError(
            f"{what} of {layer_name(path, odd[0])} is stored in {arrays[odd[0]].dtype.name}, but in "
            f"{arrays[0].dtype.name} in {layer_name(path, 0)}; equal blocks need equal types"
        )
    return np.stack(arrays)
