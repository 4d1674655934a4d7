"""Where a pipeline computes: on this process's first device, or on a mesh of its devices that share the model.

What lies where is in each array's sharding, and from there the functions below learn of the mesh: a model is of one
mesh, on which its weights lie.
"""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.nn import sharding
from lorweb_jax.settings.rules import MESH_AXIS, as_value, shown

M = TypeVar("M", bound=nnx.Module)
OPTION = "mesh"  # what sizes are called in messages


def as_mesh(sizes: Mapping[str, int] | None, heads: int) -> Mesh | None:
    """A mesh of this process's devices of these sizes; None for None. UserError for axes that there are none of, and
    for sizes that don't fit the devices or the model's attention heads."""
    if sizes is None:
        return None
    if not isinstance(sizes, Mapping) or not sizes or not set(sizes) <= set(sharding.AXES):
        named = ", ".join(f"{name}={size}" for name, size in sizes.items()) if isinstance(sizes, Mapping) else ""
        axes = ", ".join(sharding.AXES)
        raise UserError(f"the mesh is {named or shown(sizes)}; give sizes of some of {axes}, such as sequence 4", 2)
    sizes = {name: as_value(size, f"the mesh's {name}", MESH_AXIS) for name, size in sizes.items()}
    mesh = sharding.make_mesh(sizes, jax.local_devices(), OPTION)
    sharding.check_heads(heads, mesh, OPTION)
    return mesh


def targets(model: nnx.Module, dtypes: Mapping[str, Any], mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """{dotted path: shape, dtype and place} of the weights of a model of shapes."""
    variables = {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}
    return {
        path: jax.ShapeDtypeStruct(variables[path].shape, dtype, sharding=_place(mesh, variables[path]))
        for path, dtype in dtypes.items()
    }


def mesh_of(module: nnx.Module | None) -> Mesh | None:
    """That on which a module's weights lie; None where they lie on one device. All lie where the first one does, which
    is all that is looked for: this is asked in every step of a sampling that is watched."""
    variables = (node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Variable))
    array = next((each for each in map(nnx.Variable.get_value, variables) if isinstance(each, jax.Array)), None)
    if array is None or not isinstance(array.sharding, NamedSharding):
        return None
    return array.sharding.mesh if array.sharding.mesh.axis_names == sharding.AXES else None


def spread(module: M, mesh: Mesh | None) -> M:
    """The module with its arrays in their places on a mesh, each device with its share; for None on one device."""
    if mesh is None and mesh_of(module) is None:
        return module
    graphdef, state = nnx.split(module)
    moved = jax.tree.map(
        lambda variable: variable.replace(jax.device_put(variable.get_value(), _place(mesh, variable))),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.merge(graphdef, moved)


def _place(mesh: Mesh | None, variable: nnx.Variable) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, sharding.spec(mesh, sharding.variable_axes(variable), variable.shape))


def jit(function: Callable | None = None, **options: Any) -> Callable:
    """nnx.jit of a function whose first argument is a model, compiled for the mesh of the model's weights."""
    if function is None:
        return functools.partial(jit, **options)
    jitted = nnx.jit(function, **options)

    @functools.wraps(function)
    def on_its_mesh(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        mesh = mesh_of(model)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return jitted(model, *args, **kwargs)

    return on_its_mesh


@functools.cache  # each is said once
def tell_undivided(mesh: Mesh | None, rows: int, image_tokens: int, text_tokens: int) -> None:
    """Say so where the mesh is to split a batch of so many rows, or sequences of a length, that it can't."""
    data, parts = (1, 1) if mesh is None else (mesh.shape["data"], mesh.shape["sequence"])
    if rows % data:
        say(
            f"a batch of {rows} does not divide over a data axis of {data} devices, which all do the same work; leave "
            "it out, or take sequence or tensor"
        )
    if lengths := [length for length in (image_tokens, image_tokens + text_tokens) if length % parts]:
        say(
            f"{lengths[0]} tokens do not divide over a sequence axis of {parts} devices, which saves little then; take "
            "images of another size, or fewer devices"
        )
