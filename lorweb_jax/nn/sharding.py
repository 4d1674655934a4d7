"""Where arrays live: the device mesh, and the one place that says which array is split over which of its axes.

The mesh has four axes. "data" and "fsdp" share the batch between them; parameters and optimizer states are replicated
along "data" and split along "fsdp", to be gathered where they are used; "sequence" splits each example's tokens, and in
attention, which needs all of them, its heads (DeepSpeed-Ulysses); "tensor" splits the features and attention heads of
every layer, activations included.

Arrays name their axes: activations where they are made (`constrain`), parameters in their Variable's metadata
(`variable_axes`), by the role of the layer that they belong to (ROLES). RULES says what each name means on a mesh.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.common.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")
BATCH = ("data", "fsdp")  # the mesh axes that share the batch

# Logical names of an array's axes, counted from the last one; None: whole on every device. A stack's axis l, and what
# else comes before the named axes, is whole too.
Axes = tuple[str | None, ...]

# (logical axis, mesh axis that splits it), best first: a mesh axis splits the first axis of an array that it is listed
# with and that it divides, once. Where two split the same axis, the first is the outer one.
RULES: tuple[tuple[str, str], ...] = (
    # activations and what is added to them: examples; their tokens; vectors that stand for an example each, few, which
    # travel to the weights; attention heads; hidden features of an MLP
    ("batch", "data"),
    ("batch", "fsdp"),
    ("tokens", "sequence"),
    ("vectors", "data"),
    ("heads", "tensor"),
    ("heads", "sequence"),
    ("hidden", "tensor"),
    # router: a score is a sum over k, and sums of [l, b, n] are all that has to travel
    ("key", "fsdp"),
    ("key", "tensor"),
    # a modulation's outputs: computed where the weights are, which are never gathered
    ("modulation", "fsdp"),
    ("modulation", "tensor"),
    # kernels and what is low-rank beside them: "parallel" is the side of heads or hidden features, "model" the other,
    # and "features" the same of an adapter, which has few members at times
    ("parallel", "tensor"),
    ("members", "tensor"),
    ("members", "fsdp"),
    ("model", "fsdp"),
    ("features", "tensor"),
    ("features", "fsdp"),
    ("parallel", "fsdp"),
    ("query", "fsdp"),
    ("rank", "fsdp"),
    # layers with no such sides
    ("inputs", "fsdp"),
    ("outputs", "fsdp"),
    ("outputs", "tensor"),
    ("inputs", "tensor"),
)


class Role(NamedTuple):
    """Logical axes of a linear layer's kernel [i, o] (its quantised scale [1, o] or [1, 1] has the same), of its bias
    [o], and of the input and output of an adapter of the layer."""

    inputs: str
    outputs: str
    bias: str | None = None
    adapter: tuple[str, str] = ("features", "parallel")


# The roles of models/backbone.py, and "any" of layers that nothing is known of: those of encoders and autoencoder, and
# of a basis read from a file.
ROLES = {
    "column": Role("model", "parallel", "hidden"),
    "row": Role("parallel", "model", adapter=("parallel", "features")),
    "modulation": Role("model", "modulation"),
    **dict.fromkeys(("embedder", "vector", "output", "any"), Role("inputs", "outputs", adapter=("inputs", "outputs"))),
}


def linear_axes(role: str) -> tuple[Axes, Axes]:
    """(axes of the kernel, of the bias) of a linear layer. KeyError for a role that ROLES lacks."""
    inputs, outputs, bias, _ = ROLES[role]
    return (inputs, outputs), (bias,)


def basis_axes(role: str) -> dict[str, Axes]:
    """Of a basis for a layer of this role: a [l, n, i, r], b [l, n, r, o], keys [l, n, k], projection [l, k, q]."""
    inputs, outputs = ROLES[role].adapter
    return {
        "a": ("members", inputs, "rank"),
        "b": ("members", "rank", outputs),
        "keys": ("members", "key"),
        "projection": ("key", "query"),
    }


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None, option: str = "--config.mesh.…"
) -> Mesh:
    """A mesh over `devices` (default: all) of the given sizes, 1 where none is given; one size may be -1 and takes what
    the others leave.

    option: where sizes are set, for messages. Raises UserError where sizes and devices don't fit each other; nothing
    has been loaded by then.
    """
    all_processes, devices = devices is None, jax.devices() if devices is None else list(devices)
    sizes = {name: sizes.get(name, 1) for name in AXES}
    shown = " × ".join(f"{name} {sizes[name]}" for name in AXES)
    if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"the mesh {shown} can't be made; give sizes of at least 1, one of them -1 at most, which "
            f"takes the devices that the others leave: set {option}",
            2,
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = [len(devices) // fixed if sizes[name] == -1 else sizes[name] for name in AXES]
    total = math.prod(shape)
    if not 0 < total <= len(devices):
        raise UserError(
            f"the mesh {shown} needs {max(fixed, total)} devices, but {len(devices)} were found; set "
            f"{option} so that the product of its sizes is at most that",
            2,
        )
    if total < len(devices) and (-1 in sizes.values() or (all_processes and jax.process_count() > 1)):
        raise UserError(
            f"the mesh {shown} leaves {len(devices) - total} of {len(devices)} devices idle; set "
            f"{option} so that the product of its sizes is {len(devices)}",
            2,
        )
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(shape), AXES, axis_types=kinds, devices=devices[:total])
    except NotImplementedError:
        # No axes of a TPU slice have sizes that fit, such as 8 × 2 of 4 × 4 chips: those of the slice are split.
        arranged = mesh_utils.create_device_mesh(shape, devices[:total], allow_split_physical_axes=True)
        return Mesh(arranged, AXES, axis_types=kinds)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """UserError unless each of `accumulate` micro-batches divides over the mesh's data and fsdp axes."""
    shares = batch_shares(mesh)
    if batch % (shares * accumulate):
        parts = f", in {accumulate} micro-batches," if accumulate > 1 else ""
        raise UserError(
            f"a batch of {batch}{parts} does not divide over {shares} devices (data {mesh.shape['data']} × fsdp "
            f"{mesh.shape['fsdp']}); set --config.train.batch to a multiple of {shares * accumulate}, or let "
            "--config.mesh.tensor or .sequence take more of the devices",
            2,
        )


def check_heads(heads: int, mesh: Mesh, option: str = "--config.mesh.…") -> None:
    """UserError unless the attention heads divide over the mesh's tensor and sequence axes. option: see make_mesh."""
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    if heads % (tensor * sequence):
        raise UserError(
            f"{heads} attention heads do not divide over {tensor * sequence} devices (tensor {tensor} × sequence "
            f"{sequence}); set {option} so that the product of these two divides {heads}",
            2,
        )


def check_tokens(lengths: Sequence[int], mesh: Mesh) -> None:
    """UserError unless sequences of these lengths, in tokens, divide over the mesh's sequence axis."""
    parts = mesh.shape["sequence"]
    if uneven := [length for length in lengths if length % parts]:
        raise UserError(
            f"{uneven[0]} tokens do not divide over a sequence axis of {parts} devices; set --config.mesh.sequence to "
            "a divisor, or take images of other sizes",
            2,
        )


def batch_shares(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def spec(mesh: Mesh | jax.sharding.AbstractMesh, axes: Axes, shape: Sequence[int]) -> P:
    """How an array of this shape and these axes is split (RULES)."""
    split: list[tuple[str, ...]] = [()] * len(shape)
    # Fewer axes than names: an optimizer's state that has lost the leading ones.
    named = {len(shape) - at: name for at, name in enumerate(reversed(axes), 1) if name and at <= len(shape)}
    unused = {name for name in AXES if mesh.shape[name] > 1}
    for logical, name in RULES:
        for at, axis in named.items():
            parts = mesh.shape[name] * math.prod(mesh.shape[other] for other in split[at])
            if axis == logical and name in unused and shape[at] % parts == 0:
                split[at] += (name,)
                unused.remove(name)
    return P(*(names if len(names) > 1 else (names[0] if names else None) for names in split))


def local_shape(x: jax.Array, *axes: str | None) -> tuple[int, ...]:
    """Of one device's share of an array inside a jitted function, split over the mesh of the context."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x.shape
    return NamedSharding(mesh, spec(mesh, axes, x.shape)).shard_shape(x.shape)


def variable_axes(variable: nnx.Variable) -> Axes:
    """A parameter's logical axes: its metadata `axes`; whole where it has none, as norms' scales and biases."""
    return variable.get_metadata("axes", ())


def place(mesh: Mesh, shapes: Any, axes: Mapping[str, Axes]) -> Any:
    """Shapes with their shardings, of a tree that holds dicts {dotted path: shape}: parameters, optimizer states.

    axes: by dotted path. A leaf that is not in such a dict, and a scalar (a count), is replicated. KeyError for a path
    without axes.
    """

    def placed(path, leaf):
        named = path and isinstance(path[-1], jax.tree_util.DictKey) and leaf.ndim
        split = spec(mesh, axes[path[-1].key], leaf.shape) if named else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, split))

    return jax.tree_util.tree_map_with_path(placed, shapes)


def shardings_of(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def batch_split(mesh: Mesh) -> NamedSharding:
    """Of arrays [b, …]: over the mesh's data and fsdp axes."""
    return NamedSharding(mesh, P(BATCH))


def slices(stack: Any) -> tuple[Any, ...]:
    """stack[0], stack[1], ... of an array or a shape; those of a split array are split as it is."""
    if isinstance(stack, jax.core.Tracer) or not isinstance(stack.sharding, NamedSharding):
        abstract = isinstance(stack, jax.ShapeDtypeStruct)
        return (jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype),) * stack.shape[0] if abstract else tuple(stack)
    where = NamedSharding(stack.sharding.mesh, P(*stack.sharding.spec[1:]))
    if isinstance(stack, jax.ShapeDtypeStruct):
        return (jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=where),) * stack.shape[0]
    return jax.jit(tuple, out_shardings=where)(stack)


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


def put_beside(array: jax.Array, other: jax.Array) -> jax.Array:
    """An array of another's shape, split as that is; inside jitted functions, as the partitioner likes."""
    return array if isinstance(other, jax.core.Tracer) else jax.device_put(array, other.sharding)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def to_host(array: Any) -> np.ndarray:
    """The whole of an array in this process's memory, also where other hosts hold parts of it: all must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


_compiled_for: ContextVar[Any] = ContextVar("compiled_for", default=None)


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Within it functions are traced for this device, for which the mesh's stands in; None: for the mesh's own."""
    token = _compiled_for.set(device)
    try:
        yield
    finally:
        _compiled_for.reset(token)


def device_in_use() -> Any:
    """A device of the mesh in context, which need not be this machine's, or this machine's first."""
    if device := _compiled_for.get():
        return device
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device


ANY = P.UNCONSTRAINED  # in `constrain`: whatever the partitioner likes best


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """x, an array inside a jitted function, split over the mesh of the context as its axes are named.

    Each entry is a logical axis of RULES, None (not split), ANY, or a tuple of mesh axes. Mesh axes that don't divide
    the array's axis are left out; without a mesh in the context, x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    named = spec(mesh, tuple(axis if isinstance(axis, str) else None for axis in axes), x.shape)
    entries = [
        ANY if axis is ANY else _dividing(mesh, size, axis) if isinstance(axis, tuple) else split
        for axis, size, split in zip(axes, x.shape, named, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, P(*entries))


def _dividing(mesh, size: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
    kept: tuple[str, ...] = ()
    for name in names:
        if size % (mesh.shape[name] * math.prod(mesh.shape[other] for other in kept)) == 0:
            kept += (name,)
    return kept or None


def gathered(parameters: nnx.State) -> nnx.State:
    """Parameters of one block, [i, o] and the like, whole along fsdp: what a scan's step uses.

    Saying so keeps the gathering inside the scan, one block at a time, and in the dtype that the weights are stored
    in; a no-op without a mesh in the context.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return parameters

    def whole(variable: nnx.Variable) -> nnx.Variable:
        array = variable.get_value()
        split = spec(mesh, variable_axes(variable), array.shape)
        return variable.replace(
            jax.lax.with_sharding_constraint(array, P(*(_without(names, "fsdp") for names in split)))
        )

    return jax.tree.map(whole, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _without(names: Any, name: str) -> tuple[str, ...] | None:
    kept = tuple(other for other in ((names,) if isinstance(names, str) else names or ()) if other != name)
    return kept or None
