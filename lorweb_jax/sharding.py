"""Where arrays live: the device mesh, and the one place that says which parameter is split over which axis.

The mesh has one axis, "data": the batch is split over it, parameters and optimizer states are copied to all devices.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from lorweb_jax.errors import UserError

# (pattern searched in a dotted parameter path, how its axes are split); the first that matches counts.
PARAMETER_RULES: tuple[tuple[str, P], ...] = ((r"", P()),)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh with the axes of `sizes`; one size may be -1 and takes the devices that the others leave."""
    devices = jax.device_count()
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = {name: devices // fixed if size == -1 and fixed > 0 else size for name, size in sizes.items()}
    total = math.prod(shape.values())
    if min(shape.values()) < 1 or total > devices:
        raise UserError(f"the mesh {dict(sizes)} does not fit the {devices} devices found; "
                        "set --config.mesh.… so that the product of its sizes is at most that")
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape),
                         devices=jax.devices()[:total])


def check_batch(batch: int, mesh: Mesh) -> None:
    """UserError unless the batch divides over the mesh's data axis."""
    devices = mesh.shape["data"]
    if batch % devices:
        raise UserError(f"a batch of {batch} does not divide over {devices} devices; set --config.train.batch "
                        f"to a multiple of {devices}, or --config.mesh.data to a divisor of {batch}")


def parameter_sharding(mesh: Mesh, path: str) -> NamedSharding:
    """Where the parameter (or its optimizer state) of this dotted path lives."""
    return NamedSharding(mesh, next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, path)))


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """The shardings of a tree that holds dicts {dotted path: array}, like an optimizer's state over trainables.

    A leaf that is not in such a dict (a count) is copied to all devices.
    """
    def sharding(path, leaf):
        if path and isinstance(path[-1], jax.tree_util.DictKey):
            return parameter_sharding(mesh, path[-1].key)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays [b, …] of a host's batch, split over the mesh's data axis."""
    split = NamedSharding(mesh, P("data"))
    return {name: jax.make_array_from_process_local_data(split, value) for name, value in batch.items()}
