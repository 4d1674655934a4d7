"""Where arrays live: the device mesh, and the one place that says which array is split over which of its axes.

The mesh has three axes. "data" and "fsdp" share the batch between them; parameters and optimizer states are copied
along "data" and split along "fsdp", to be gathered where they are used; "tensor" splits the features and attention
heads of every layer, activations included. Rules name the axes of an array that a mesh axis may split, best first;
an array none of whose axes divides is copied.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.common.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that share the batch

# Linear layers whose outputs are heads or hidden features: split by output. Those that follow: split by input.
_COLUMN = r"(to_q|to_k|to_v|add_[qkv]_proj|net_0_proj|proj_mlp)"
_ROW = r"(to_out_0|to_add_out|net_2|single_transformer_blocks\.proj_out)"
# Applied to one vector an example, for all blocks at once: computed where the weights are, never gathered.
_MODULATION = r"norm(1|1_context)?\.linear"

# (pattern searched in a dotted path, {mesh axis: array axes that it may split, best first}); the first that matches
# counts. Array axes are counted from the end where a stack adds a leading axis l. Letters as in method.md.
PARAMETER_RULES: tuple[tuple[str, dict[str, tuple[int, ...]]], ...] = (
    # basis: a [l, n, i, r], b [l, n, r, o], keys [l, n, k], projection [l, k, q]
    (rf"basis\..*{_ROW}\.a$", {"tensor": (-2,), "fsdp": (-3, -2, -1)}),
    (r"basis\..*\.a$", {"tensor": (-3, -2), "fsdp": (-3, -2, -1)}),
    (rf"basis\..*{_ROW}\.b$", {"tensor": (-3, -1), "fsdp": (-3, -1, -2)}),
    (r"basis\..*\.b$", {"tensor": (-1,), "fsdp": (-3, -1, -2)}),
    # the router's are split by k: a score is a sum over k, and sums of [l, b, n] are all that has to travel
    (r"basis\..*\.keys$", {"fsdp": (-1, -2), "tensor": (-1,)}),
    (r"basis\..*\.projection$", {"fsdp": (-2, -1), "tensor": (-2,)}),
    # linear layers [l, i, o] or [i, o]; the scale of a quantised kernel is [l, 1, o]
    (rf"{_MODULATION}\.(kernel|scale)", {"fsdp": (-1,), "tensor": (-1,)}),
    (rf"{_COLUMN}\.(kernel|scale)", {"tensor": (-1,), "fsdp": (-2, -1)}),
    (rf"{_ROW}\.(kernel|scale)", {"tensor": (-2,), "fsdp": (-1, -2)}),
    (rf"{_COLUMN}\.bias", {"tensor": (-1,)}),
    # all else of two axes or more: encoders, autoencoder, embedders
    (r"(^|\.)(kernel|embedding)$", {"fsdp": (-2, -1), "tensor": (-1, -2)}),
    (r"", {}),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) of the given sizes; one size may be -1 and takes what the others leave.

    Raises UserError where sizes and devices don't fit each other; nothing has been loaded by then.
    """
    devices = jax.devices() if devices is None else list(devices)
    shown = " × ".join(f"{name} {sizes[name]}" for name in AXES)
    if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"the mesh {shown} can't be made; give sizes of at least 1, one of them -1 at most, which "
            "takes the devices that the others leave: set --config.mesh.…",
            2,
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = [len(devices) // fixed if sizes[name] == -1 else sizes[name] for name in AXES]
    total = math.prod(shape)
    if not 0 < total <= len(devices):
        raise UserError(
            f"the mesh {shown} needs {max(fixed, total)} devices, but {len(devices)} were found; set "
            "--config.mesh.… so that the product of its sizes is at most that",
            2,
        )
    if total < len(devices) and (-1 in sizes.values() or jax.process_count() > 1):
        raise UserError(
            f"the mesh {shown} leaves {len(devices) - total} of {len(devices)} devices idle; set "
            f"--config.mesh.… so that the product of its sizes is {len(devices)}",
            2,
        )
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:total])


def check_batch(batch: int, mesh: Mesh) -> None:
    """UserError unless the batch divides over the mesh's data and fsdp axes."""
    shares = batch_shares(mesh)
    if batch % shares:
        raise UserError(
            f"a batch of {batch} does not divide over {shares} devices (data {mesh.shape['data']} × fsdp "
            f"{mesh.shape['fsdp']}); set --config.train.batch to a multiple of {shares}, or let "
            "--config.mesh.tensor take more of the devices",
            2,
        )


def check_heads(heads: int, mesh: Mesh) -> None:
    """UserError unless the attention heads divide over the mesh's tensor axis."""
    if heads % mesh.shape["tensor"]:
        raise UserError(
            f"{heads} attention heads do not divide over a tensor axis of {mesh.shape['tensor']}; set "
            f"--config.mesh.tensor to a divisor of {heads}",
            2,
        )


def batch_shares(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def parameter_spec(mesh: Mesh | jax.sharding.AbstractMesh, path: str, shape: Sequence[int]) -> P:
    """How the parameter (or its optimizer state) of this dotted path and shape is split."""
    rule = next(rule for pattern, rule in PARAMETER_RULES if re.search(pattern, path))
    split: list[tuple[str, ...]] = [()] * len(shape)
    for name, axes in rule.items():
        size = mesh.shape[name]
        for axis in axes:
            if size > 1 and -axis <= len(shape):
                held = size * math.prod(mesh.shape[other] for other in split[axis])
                if shape[axis] % held == 0:
                    split[axis] += (name,)
                    break
    return P(*(names if len(names) > 1 else (names[0] if names else None) for names in split))


def parameter_sharding(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, parameter_spec(mesh, path, shape))


def place(mesh: Mesh, shapes: Any) -> Any:
    """Shapes with their shardings, of a tree that holds dicts {dotted path: shape}: parameters, optimizer states.

    A leaf that is not in such a dict (a count) is copied to all devices.
    """

    def placed(path, leaf):
        named = path and isinstance(path[-1], jax.tree_util.DictKey)
        where = parameter_sharding(mesh, path[-1].key, leaf.shape) if named else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree_util.tree_map_with_path(placed, shapes)


def shardings_of(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def batch_split(mesh: Mesh) -> NamedSharding:
    """Of arrays [b, …]: over the mesh's data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def held_slices(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> dict[jax.Device, tuple[slice, ...]]:
    """{device of this process: the slice of each axis of an array of `shape` that it holds}."""
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: index for device, index in indices.items() if index is not None}


def batch_rows(mesh: Mesh, batch: int) -> list[int]:
    """Which rows of a batch this process's devices hold, in the order in which `put_batch` takes them."""
    slices = held_slices(batch_split(mesh), (batch,)).values()
    return sorted({row for (part,) in slices for row in range(*part.indices(batch))})


def put_batch(mesh: Mesh, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Arrays [b, …] of a host's share of the batch, in their places."""
    split = batch_split(mesh)
    return {name: jax.make_array_from_process_local_data(split, np.asarray(value)) for name, value in batch.items()}


def put(array: Any, where: jax.ShapeDtypeStruct) -> jax.Array:
    """A host's array in the dtype and sharding of `where`; each process moves only what its devices hold."""
    return jax.make_array_from_callback(
        where.shape, where.sharding, lambda index: np.asarray(array[index]).astype(where.dtype)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def to_host(array: Any) -> np.ndarray:
    """The whole of an array in this process's memory, also where other hosts hold parts of it: all must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


ANY = P.UNCONSTRAINED  # in `constrain`: whatever the partitioner likes best


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """x, an array inside a jitted function, split over the mesh of the context as named, axis by axis.

    Each entry is "batch" (split over data and fsdp), a mesh axis or a tuple of them, None (not split) or ANY. Mesh
    axes that don't divide the array's axis are left out; without a mesh in the context, x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = P(
        *(
            axis if axis in (None, ANY) else dividing(mesh, size, BATCH if axis == "batch" else axis)
            for axis, size in zip(axes, x.shape, strict=True)
        )
    )
    return jax.lax.with_sharding_constraint(x, spec)


def dividing(mesh, size: int, names: str | tuple[str, ...]) -> tuple[str, ...] | None:
    kept: tuple[str, ...] = ()
    for name in (names,) if isinstance(names, str) else names:
        if size % (mesh.shape[name] * math.prod(mesh.shape[other] for other in kept)) == 0:
            kept += (name,)
    return kept or None


def gathered(parameters: Any, within: str) -> Any:
    """Parameters of one block of the stack `within`, [i, o] and the like, whole along fsdp: what a scan's step uses.

    Saying so keeps the gathering inside the scan, one block at a time, and in the dtype that the weights are stored
    in. Takes a tree whose paths are those of the rules (an nnx.State); a no-op without a mesh in the context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return parameters

    def whole(path, leaf):
        name = ".".join([within, *(str(getattr(key, "key", getattr(key, "name", key))) for key in path)])
        spec = parameter_spec(mesh, name.removesuffix(".value"), leaf.shape)
        return jax.lax.with_sharding_constraint(leaf, P(*(_without(names, "fsdp") for names in spec)))

    return jax.tree_util.tree_map_with_path(whole, parameters)


def _without(names: Any, name: str) -> tuple[str, ...] | None:
    kept = tuple(other for other in ((names,) if isinstance(names, str) else names or ()) if other != name)
    return kept or None
