"""The published files of Pair Customization (method.md §7): one adapter, content or style, in XLabs' layout.

Keys are `<processor>.down.weight` [r, i] and `<processor>.up.weight` [o, r], without metadata or alpha (scale 1). q, k
and v of a stream share their A, and their B's rows follow one another; blocks without keys have no adapter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.adapters.formats import lora_names
from lorweb_jax.adapters.formats.layer_names import layer_name
from lorweb_jax.adapters.formats.lora_read import Layers, finite
from lorweb_jax.adapters.pair import Member
from lorweb_jax.common.errors import UserError
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import write

_DOWN, _UP = ".down.weight", ".up.weight"


def is_published(checkpoint: Checkpoint) -> bool:
    """Whether a file has the published layout: down and up of XLabs' processors, all of one rank, and no more.

    XLabs' own LoRAs may have it too; nothing in a file tells them from an adapter of Pair Customization.
    """
    keys = [lora_names.parse(key) for key in checkpoint.shapes]
    if not keys or not all(key and key.scheme == "XLabs'" and key.role in ("down", "up") for key in keys):
        return False
    if any(len(shape) != 2 for shape in checkpoint.shapes.values()):
        return False
    ranks = {shape[0] if key.role == "down" else shape[-1] for key, shape in zip(keys, checkpoint.shapes.values())}
    return len(ranks) == 1


def read_member(path: str | Path, layers: Layers) -> Member:
    """An adapter's file; B [o, r] and A [r, i] as they are stored, converted to float32.

    layers: of the model. Raises UserError for a file of another kind, with keys that are no processor's, of another
    model's widths or blocks, of unequal ranks, and with numbers that aren't finite.
    """
    checkpoint = Checkpoint(path)
    file = checkpoint.files[0]
    places = {}
    for key in checkpoint.shapes:
        parsed = lora_names.parse(key)
        place = lora_names.place(parsed) if parsed and parsed.scheme == "XLabs'" else None
        if place is None or parsed.role not in ("down", "up"):
            raise UserError(
                f"{file} holds {key}, which is no adapter of Pair Customization; give a content_lora.safetensors or "
                "style_lora.safetensors as its training writes them"
            )
        places.setdefault(place, {})[parsed.role] = key
    if not places:
        raise UserError(f"{file} holds no tensors; give a style_lora.safetensors")
    ranks = {checkpoint.shapes[keys["down"]][0] for keys in places.values() if "down" in keys}
    rank = min(ranks, default=0)
    a, b, blocks = {}, {}, {}
    for place, keys in places.items():
        absent = [part for part in place.paths if part not in layers or place.block >= layers[part].depth]
        if absent:
            raise UserError(
                f"{file} adapts {layer_name(absent[0], place.block)}, which the model doesn't have; use the file with "
                "its own model"
            )
        widths = [layers[part].outputs for part in place.paths]
        inputs = layers[place.paths[0]].inputs
        shapes = {role: list(checkpoint.shapes[key]) for role, key in keys.items()}
        expected = {"down": [rank, inputs], "up": [sum(widths), rank]}
        if shapes != expected:
            raise UserError(
                f"{file}: {next(iter(keys.values())).rpartition('.')[0].rpartition('.')[0]} has {_said(shapes)}, "
                f"expected {_said(expected)}; use the file with its own model"
            )
        down, up = (finite(checkpoint, keys[role]) for role in ("down", "up"))
        for part, rows in zip(place.paths, np.split(up, np.cumsum(widths)[:-1])):
            layer = layers[part]
            a.setdefault(part, np.zeros((layer.depth, rank, layer.inputs), np.float32))[place.block] = down
            b.setdefault(part, np.zeros((layer.depth, rank, layer.outputs), np.float32))[place.block] = rows.T
            blocks.setdefault(part, []).append(place.block)
    return Member(a, b, {part: tuple(sorted(indices)) for part, indices in blocks.items()})


def write_member(path: str | Path, member: Member, dtype: Any = np.float32) -> None:
    """Write an adapter in `dtype`, as the published training does: the same member gives the same bytes.

    Raises UserError where q, k and v of a block don't share their A or a layer has no name, which this format can't
    hold, and for numbers that are not finite in `dtype`.
    """
    nameless = member.a.keys() - {part for paths in lora_names.PROCESSORS.values() for part in paths}
    if nameless:
        part = min(nameless)
        raise UserError(
            f"{layer_name(part, next(iter(member.blocks[part]), 0))} has an update, and this format has no name for "
            "it; export an ordinary LoRA instead"
        )
    tensors = {}
    for name, paths in lora_names.PROCESSORS.items():
        for block in sorted({block for part in paths for block in member.blocks.get(part, ())}):
            own = [part for part in paths if block in member.blocks.get(part, ())]
            for part in own:
                if not np.array_equal(member.a[part][block], member.a[own[0]][block]):
                    raise UserError(
                        f"{layer_name(part, block)} has another A than {layer_name(own[0], block)}; in this format "
                        "q, k and v share one; export an ordinary LoRA instead"
                    )
            none = np.zeros_like(member.b[own[0]][block])  # outputs of q, k and v are as wide as one another
            ups = [member.b[part][block] if part in own else none for part in paths]
            where = name.replace("{l}", str(block))
            tensors[where + _DOWN] = member.a[own[0]][block].astype(dtype)
            tensors[where + _UP] = np.concatenate([up.T for up in ups]).astype(dtype)
    write(path, tensors)


def _said(shapes: Mapping[str, list[int]]) -> str:
    return " and ".join(f"{role} {shapes[role]}" if role in shapes else f"no {role}" for role in ("down", "up"))
