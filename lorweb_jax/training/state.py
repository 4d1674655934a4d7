"""A training run's arrays: shapes and shardings first, then the weights to start from, each made or read in its place.

What is trained is chosen once, by one NNX filter (`split`): gradient, optimizer, average, checkpoint and export see
the trainables alone, as a dict {dotted path: array}; frozen weights are arguments of the step and nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Scale
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.fresh import arrays_of
from lorweb_jax.training.job import Job

Arrays = dict[str, jax.Array]  # by dotted path
Shapes = dict[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A job's model without its arrays: its structure, and {dotted path: (path, Variable of a shape)} of a part."""

    graphdef: nnx.GraphDef
    trainable: dict[str, tuple[tuple, nnx.Variable]]
    frozen: dict[str, tuple[tuple, nnx.Variable]]

    @classmethod
    def of(cls, job: Job, seed: int) -> "Layout":
        """From job.build, traced; UserError if nothing in the model is trainable."""
        graphdef, trainable, frozen = split(job, nnx.eval_shape(lambda: job.build(nnx.Rngs(random_key(seed)))))
        if not trainable:
            raise UserError(
                f"the model has no {job.trainable.__name__} that the job's filter would train; "
                "check `trainable` and `trainable_filter` of the job"
            )
        return cls(graphdef, _by_path(trainable), _by_path(frozen))

    def shapes(self, part: str, mesh: Mesh, dtype: Any) -> Shapes:
        """By dotted path, of the part "trainable" or "frozen": shapes, shardings and stored dtypes.

        Weights that the model makes in float32 are stored in `dtype`; quantised kernels and their scales as they are.
        """
        variables = {name: variable for name, (_, variable) in getattr(self, part).items()}
        return sharding.place(
            mesh,
            {
                name: jax.ShapeDtypeStruct(variable.shape, _stored(variable, dtype))
                for name, variable in variables.items()
            },
        )

    def model(self, trainable: Arrays, frozen: Arrays) -> nnx.Module:
        """The model that holds these arrays."""
        variables = {path: variable.replace(trainable[name]) for name, (path, variable) in self.trainable.items()}
        return self._model(variables, frozen)

    def frozen_model(self, frozen: Arrays) -> nnx.Module:
        """The model that holds these arrays, and shapes where its trainables are."""
        return self._model(dict(self.trainable.values()), frozen)

    def _model(self, variables: dict[tuple, nnx.Variable], frozen: Arrays) -> nnx.Module:
        held = {path: variable.replace(frozen[name]) for name, (path, variable) in self.frozen.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(variables | held))


def split(job: Job, model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, trainable, frozen) of a model: the one place where the job's filter is used."""
    return nnx.split(model, getattr(job, "trainable_filter", job.trainable), ...)


def _by_path(state: nnx.State) -> dict[str, tuple[tuple, nnx.Variable]]:
    return {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


def _stored(variable: nnx.Variable, dtype: Any) -> np.dtype:
    as_made = isinstance(variable, Scale) or variable.dtype != jnp.float32
    return variable.dtype if as_made else jnp.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class StateShapes:
    """Everything that a step takes beside the batch, as shapes with dtypes and shardings."""

    trainable: Shapes
    opt_state: Any
    frozen: Shapes

    @classmethod
    def of(cls, layout: Layout, optimizer: optax.GradientTransformation, config, mesh: Mesh) -> "StateShapes":
        trainable = layout.shapes("trainable", mesh, jnp.float32)
        opt_state = sharding.place(mesh, jax.eval_shape(optimizer.init, trainable))
        return cls(trainable, opt_state, layout.shapes("frozen", mesh, config.train.param_dtype))


def initial_trainables(job: Job, shapes: Shapes, config) -> Arrays:
    """The weights to start from, float32: what the job reads (`initial`), and for the rest what it builds."""
    built = _built(job, "trainable", shapes, config.seed)
    if hasattr(job, "initial"):
        built |= _placed(job.initial(shapes), shapes)
    return built


def frozen_weights(job: Job, shapes: Shapes, config) -> Arrays:
    """The frozen weights: read by the job, or built if it reads none."""
    if not hasattr(job, "frozen"):
        return _built(job, "frozen", shapes, config.seed)
    frozen = _placed(job.frozen(shapes), shapes)
    if missing := sorted(shapes.keys() - frozen.keys()):
        raise UserError(
            f"{len(missing)} frozen weights are missing, {missing[0]} first; "
            "check that the files and the config's sizes belong together"
        )
    return frozen


def _built(job: Job, part: str, shapes: Shapes, seed: int) -> Arrays:
    """One part of the job's fresh model, made where it will live; the other part is never computed."""

    def arrays() -> Arrays:
        _, trainable, frozen = split(job, job.build(nnx.Rngs(random_key(seed))))
        held = _by_path(trainable if part == "trainable" else frozen)
        return {name: variable.get_value().astype(shapes[name].dtype) for name, (_, variable) in held.items()}

    return arrays_of(arrays, shapes)


def _placed(held: Mapping[str, Any], shapes: Shapes) -> Arrays:
    """Arrays that a job read, in their places; those that already are there are taken as they are."""
    placed = {}
    for name, array in held.items():
        if name not in shapes or shapes[name].shape != array.shape:
            raise UserError(
                f"the weight {name} of shape {array.shape} has no place in this job's model; "
                "check that the files and the config's sizes belong together"
            )
        where = shapes[name]
        placed[name] = (
            array
            if isinstance(array, jax.Array) and (array.dtype, array.sharding) == (where.dtype, where.sharding)
            else sharding.put(array, where)
        )
    return placed


def count(arrays: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(array.size for array in arrays.values())
