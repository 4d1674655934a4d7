"""Published names in recordings of Pair Customization, such as `double_blocks.0.processor.qkv_lora1_content.up`."""

from typing import NamedTuple

import numpy as np

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.formats import lora_names
from lorweb_jax.adapters.members import Members
from parity.report import Absent


class Tensor(NamedTuple):
    """A recorded tensor: the stacked layers that it belongs to, its block, "down" (A) or "up" (B), and its adapter.

    The adapter is None where the block has only one.
    """

    paths: tuple[str, ...]
    block: int
    side: str
    member: str | None


def parse(name: str) -> Tensor:
    """The tensor of a published name; Absent for what is none."""
    module, _, side = name.rpartition(".")
    member = next((member for member in pair.MEMBERS if module.endswith(f"_{member}")), None)
    key = lora_names.parse(f"{module.removesuffix(f'_{member}')}.{side}.weight")
    place = lora_names.place(key) if key else None
    if place is None or side not in ("down", "up"):
        raise Absent(f"{name} names no adapter that is known here")
    return Tensor(place.paths, place.block, side, member)


def read(member: pair.Member, tensor: Tensor) -> np.ndarray:
    """A [r, i] or B [Σo, r] of a member, as published files hold it."""
    if tensor.side == "down":
        return member.a[tensor.paths[0]][tensor.block]
    return np.concatenate([member.b[path][tensor.block].T for path in tensor.paths])


def write(member: pair.Member, tensor: Tensor, values: np.ndarray) -> None:
    """The inverse of `read`, into arrays that are the member's own."""
    if tensor.side == "down":
        for path in tensor.paths:
            member.a[path][tensor.block] = values
        return
    ends = np.cumsum([member.b[path].shape[2] for path in tensor.paths])
    for path, rows in zip(tensor.paths, np.split(values, ends[:-1])):
        member.b[path][tensor.block] = rows.T


def blocks_of(case: dict, member: str) -> dict[str, tuple[int, ...]]:
    """From a case of cases.json: {stack: indices of the blocks that a member is on}."""
    stacks = {"transformer_blocks": "double", "single_transformer_blocks": "single"}
    return {stack: tuple(case[f"{kind}_{member}"]) for stack, kind in stacks.items()}


def empty_members(case: dict, layers: dict) -> Members:
    """Members of a case's rank and blocks, all zero."""
    return Members(
        layers,
        [tuple(paths) for paths in lora_names.PROCESSORS.values()],
        dict.fromkeys(pair.MEMBERS, case["rank"]),
        {member: blocks_of(case, member) for member in pair.MEMBERS},
    )
