"""A training run's arrays: what changes with every step, as one pytree, and how a job's model is taken apart for it.

Shapes and shardings come first, then the weights to start from, each made or read in its place. What is trained is
chosen once, by one NNX filter (`split`): gradient, optimizer and average see the trainables alone, as a dict {dotted
path: array}; frozen weights are arguments of the step and nothing else. A basis's own frozen parameters, which no file
gives back, are constants of the state: checkpoints and exports hold them beside the trainables.
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

from lorweb_jax.adapters.basis import FrozenBasisParam
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import offload, sharding
from lorweb_jax.nn.layers import Kept
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.fresh import arrays_of
from lorweb_jax.training.job import Job, Phase

Arrays = dict[str, jax.Array]  # by dotted path
Shapes = dict[str, jax.ShapeDtypeStruct]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What is donated to a training step and returned by it, and what a checkpoint holds.

    step: updates done, uint32 []. trainable: float32, by dotted path. average: their moving average, None where none is
    kept. optimizer: optax's state of each phase, by the phase's name. constants: the FrozenBasisParams, float32, which
    no step changes.
    """

    step: jax.Array
    trainable: Arrays
    average: Arrays | None
    optimizer: dict[str, optax.OptState]
    constants: Arrays

    @property
    def exported(self) -> Arrays:
        """What is evaluated and exported: the average where one is kept, else the trainables; and the constants."""
        return (self.trainable if self.average is None else self.average) | self.constants


@dataclasses.dataclass(frozen=True)
class Partition:
    """A job's model without its arrays: its structure, and {dotted path: (path, Variable of a shape)} of each part.
    offloaded: the job's."""

    graphdef: nnx.GraphDef
    trainable: dict[str, tuple[tuple, nnx.Variable]]
    constants: dict[str, tuple[tuple, nnx.Variable]]
    frozen: dict[str, tuple[tuple, nnx.Variable]]
    offloaded: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job, seed: int) -> "Partition":
        """From job.build, traced; UserError if nothing in the model is trainable."""
        graphdef, *parts = split(job, nnx.eval_shape(lambda: job.build(nnx.Rngs(random_key(seed)))))
        partition = cls(graphdef, *map(_by_path, parts), tuple(job.offloaded))
        if not partition.trainable:
            raise UserError(
                f"the model has no {job.trainable.__name__} that the job's filter would train; "
                "check `trainable` and `trainable_filter` of the job"
            )
        return partition

    def trainable_shapes(self, mesh: Mesh) -> Shapes:
        """Shapes and shardings of the trainables, all float32."""
        return _shapes(self.trainable, mesh, jnp.float32)

    def constant_shapes(self, mesh: Mesh) -> Shapes:
        """Shapes and shardings of the constants, all float32."""
        return _shapes(self.constants, mesh, jnp.float32)

    def frozen_shapes(self, mesh: Mesh, dtype: Any) -> Shapes:
        """Shapes, shardings and stored dtypes of the frozen weights.

        Those that the model makes in float32 are stored in `dtype`; quantised kernels and what is `Kept` as they are.
        Kernels of the job's `offloaded` stacks are in the host's memory; UserError where devices can't read that.
        """
        return offload.offloaded(_shapes(self.frozen, mesh, dtype), self.offloaded)

    def paths(self, phase: Phase) -> list[str]:
        """Dotted paths of the trainables that a phase updates; UserError where there are none."""
        trains = nnx.filterlib.to_predicate(phase.trains)
        paths = [name for name, (path, variable) in self.trainable.items() if trains(path, variable)]
        if not paths:
            raise UserError(
                f"the phase {phase.name!r} of the job trains nothing; check the filter `trains` of the phase"
            )
        return paths

    def unstacked(self, job: Job, frozen: Arrays) -> tuple["Partition", Arrays]:
        """(the partition, the frozen weights, given stacked) once `job.unstack` has taken stacks apart."""
        model = self.frozen_model(frozen)
        job.unstack(model)
        graphdef, _, _, rest = split(job, model)
        of_blocks = _by_path(rest)
        shapes = {
            name: (path, variable.replace(jax.ShapeDtypeStruct(variable.shape, variable.dtype)))
            for name, (path, variable) in of_blocks.items()
        }
        arrays = {name: variable.get_value() for name, (_, variable) in of_blocks.items()}
        return dataclasses.replace(self, graphdef=graphdef, frozen=shapes), arrays

    def model(self, own: Arrays, frozen: Arrays) -> nnx.Module:
        """The model that holds these arrays: trainables and constants, and frozen weights."""
        variables = (self.trainable | self.constants).items()
        return self._model({path: variable.replace(own[name]) for name, (path, variable) in variables}, frozen)

    def frozen_model(self, frozen: Arrays) -> nnx.Module:
        """The model that holds these arrays, and shapes where its trainables and constants are."""
        return self._model(dict((self.trainable | self.constants).values()), frozen)

    def _model(self, variables: dict[tuple, nnx.Variable], frozen: Arrays) -> nnx.Module:
        rest = {path: variable.replace(frozen[name]) for name, (path, variable) in self.frozen.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(variables | rest))


def split(job: Job, model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]:
    """(structure, trainable, constants, frozen) of a model: the one place where the job's filter is used."""
    return nnx.split(model, job.trainable_filter, FrozenBasisParam, ...)


def _by_path(state: nnx.State) -> dict[str, tuple[tuple, nnx.Variable]]:
    return {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


def _shapes(part: dict[str, tuple[tuple, nnx.Variable]], mesh: Mesh, dtype: Any) -> Shapes:
    return sharding.place(
        mesh,
        {name: jax.ShapeDtypeStruct(variable.shape, _stored(variable, dtype)) for name, (_, variable) in part.items()},
        _axes(part),
    )


def _axes(part: dict[str, tuple[tuple, nnx.Variable]]) -> dict[str, sharding.Axes]:
    """Logical axes by dotted path."""
    return {name: sharding.variable_axes(variable) for name, (_, variable) in part.items()}


def _stored(variable: nnx.Variable, dtype: Any) -> np.dtype:
    as_made = isinstance(variable, Kept) or variable.dtype != jnp.float32
    return variable.dtype if as_made else jnp.dtype(dtype)


def new_state(
    job: Job,
    partition: Partition,
    optimizer: optax.GradientTransformation,
    config,
    trainable: Arrays,
    constants: Arrays,
) -> TrainState:
    """The state before the first step, of given trainables and constants; a pure function of these."""
    return TrainState(
        step=jnp.zeros([], jnp.uint32),
        trainable=trainable,
        average=jax.tree.map(jnp.copy, trainable) if config.train.ema else None,
        optimizer={
            phase.name: optimizer.init({path: trainable[path] for path in partition.paths(phase)})
            for phase in job.phases()
        },
        constants=constants,
    )


def state_shapes(
    job: Job, partition: Partition, optimizer: optax.GradientTransformation, config, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(
        lambda *parts: new_state(job, partition, optimizer, config, *parts),
        partition.trainable_shapes(mesh),
        partition.constant_shapes(mesh),
    )
    return sharding.place(mesh, shapes, _axes(partition.trainable | partition.constants))


def initial_state(
    job: Job, partition: Partition, optimizer: optax.GradientTransformation, config, shapes: TrainState
) -> TrainState:
    """The state before the first step, in its places: arrays that the job reads (`initial`), or else builds."""
    own = shapes.trainable | shapes.constants
    arrays = _built(job, "trainable", shapes.trainable, config.seed)
    arrays |= _built(job, "constants", shapes.constants, config.seed)
    arrays |= _placed(job.initial(own), own)
    begin = jax.jit(
        lambda *parts: new_state(job, partition, optimizer, config, *parts),
        donate_argnums=(0, 1),
        out_shardings=sharding.shardings_of(shapes),
    )
    return begin(*({name: arrays[name] for name in part} for part in (shapes.trainable, shapes.constants)))


def frozen_weights(job: Job, shapes: Shapes, config) -> Arrays:
    """The frozen weights: read by the job, or built if it reads none."""
    weights = job.frozen(shapes)
    if weights is None:
        return _built(job, "frozen", shapes, config.seed)
    frozen = _placed(weights, shapes)
    if missing := sorted(shapes.keys() - frozen.keys()):
        raise UserError(
            f"{len(missing)} frozen weights are missing, {missing[0]} first; "
            "check that the files and the config's sizes belong together"
        )
    return frozen


def _built(job: Job, part: str, shapes: Shapes, seed: int) -> Arrays:
    """One part of the job's fresh model, made where it will live; the other parts are never computed."""
    if not shapes:
        return {}

    def arrays() -> Arrays:
        _, trainable, constants, frozen = split(job, job.build(nnx.Rngs(random_key(seed))))
        variables = _by_path({"trainable": trainable, "constants": constants, "frozen": frozen}[part])
        return {name: variable.get_value().astype(shapes[name].dtype) for name, (_, variable) in variables.items()}

    return arrays_of(arrays, shapes)


def _placed(weights: Mapping[str, Any], shapes: Shapes) -> Arrays:
    """Arrays that a job read, in their dtypes and shardings; those that have these already are taken as they are."""
    arrays = {}
    for name, array in weights.items():
        if name not in shapes or shapes[name].shape != array.shape:
            raise UserError(
                f"the weight {name} of shape {array.shape} has no place in this job's model; "
                "check that the files and the config's sizes belong together"
            )
        shape = shapes[name]
        ready = isinstance(array, jax.Array) and (array.dtype, array.sharding) == (shape.dtype, shape.sharding)
        arrays[name] = array if ready else sharding.put(array, shape)
    return arrays


def count(arrays: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(array.size for array in arrays.values())
