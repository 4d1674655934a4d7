"""Weights that lie in the host's memory and come to the device block by block, while blocks are scanned.

What lies where is in an array's sharding (its memory kind), hence in its type inside jitted functions: nothing else has
to know. A scan over a stack in host memory copies each block's part as its turn begins, forward and once more on the
way back (layers.scan_stack); the device holds one block's kernels at a time.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorweb_jax.common.errors import UserError

T = TypeVar("T")
OFFLOADS = ("none", "blocks")
# Of jax's memory kinds the one that devices copy from on their own.
PINNED = "pinned_host"


def offloaded(shapes: Mapping[str, jax.ShapeDtypeStruct], stacks: Collection[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes by dotted path, those of the kernels in `stacks` (paths of stacked blocks) in the host's memory.

    Biases, norms and the scales of 8-bit kernels stay on the device, as each copy has a cost of its own. UserError
    where the devices can't copy from the host's memory.
    """
    below = tuple(f"{stack}." for stack in stacks)

    def moved(path: str, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not (path.startswith(below) and path.endswith(".kernel")):
            return shape
        require(next(iter(shape.sharding.device_set)))
        where = shape.sharding
        if not isinstance(where, NamedSharding):  # jitted functions see the memory kind of these alone
            where = NamedSharding(Mesh(np.array(list(where.device_set)), ("device",)), PartitionSpec())
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where.with_memory_kind(PINNED))

    return {path: moved(path, shape) for path, shape in shapes.items()}


def require(device: jax.Device) -> None:
    """UserError unless programs of this device can take arguments from the host's memory."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if PINNED not in kinds:
        raise UserError(
            f"offload is 'blocks', but {device.device_kind} offers the memory kinds {', '.join(kinds) or 'none'} and "
            f"no {PINNED}, from which weights could be streamed; set offload to 'none'",
            2,
        )


def is_offloaded(array: Any) -> bool:
    """Whether an array, in a jitted function or outside, lies in the host's memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def any_offloaded(tree: Any) -> bool:
    return any(map(is_offloaded, jax.tree.leaves(tree)))


def on_device(tree: T) -> T:
    """The same with copies, on the device, of what lies in the host's memory; for use inside jitted functions."""
    return jax.tree.map(
        lambda array: jax.device_put(array, jax.memory.Space.Device) if is_offloaded(array) else array, tree
    )
