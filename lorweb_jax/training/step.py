"""One step of training, as pure functions that training/loop.py runs and planning compiles without any array.

A step is two programs: `encode`, what frozen parts alone make of the batch, and `update`, of each phase the loss, its
gradient and the update of its trainables. Apart, they compile side by side, and the first leaves nothing in the
second's memory.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lorweb_jax.nn import sharding
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.job import Batch, Job, Phase
from lorweb_jax.training.optimizer import moving_average
from lorweb_jax.training.state import Arrays, Partition, TrainState

Metrics = dict[str, jax.Array]


def make_update(
    job: Job, partition: Partition, optimizer: optax.GradientTransformation, config
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, frozen, batch) -> (state, metrics): one update by each phase of the job.

    All randomness of a step comes from config.seed and state.step. Metrics: "loss" and "gradient_norm", with what the
    job's loss adds; of several phases these by "<phase>/<name>", and "loss", their sum.
    """

    def run(phase: Phase, state: TrainState, trainable: Arrays, frozen: Arrays, batch: Batch):
        """(updated trainables of the phase, its optimizer state, metrics)."""
        key = jax.random.fold_in(random_key(config.seed), state.step)
        subset = {path: trainable[path] for path in partition.paths(phase)}

        def loss_of(subset: Arrays):
            with jax.named_scope("loss"):
                return phase.loss(partition.model(trainable | subset | state.constants, frozen), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(subset)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.optimizer[phase.name], subset)
            metrics = {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradient)}
            return optax.apply_updates(subset, updates), opt_state, metrics

    def update(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, opt_states, by_phase = state.trainable, {}, {}
        for phase in job.phases():
            with jax.named_scope(phase.name):
                updated, opt_states[phase.name], by_phase[phase.name] = run(phase, state, trainable, frozen, batch)
            trainable = trainable | updated
        average = state.average
        if average is not None:
            with jax.named_scope("average"):
                average = moving_average(average, trainable, state.step, config.train.ema)
        return TrainState(state.step + 1, trainable, average, opt_states, state.constants), _joined(by_phase)

    return update


def _joined(by_phase: dict[str, Metrics]) -> Metrics:
    if len(by_phase) == 1:
        return next(iter(by_phase.values()))
    named = {f"{phase}/{name}": value for phase, metrics in by_phase.items() for name, value in metrics.items()}
    return {"loss": sum(metrics["loss"] for metrics in by_phase.values()), **named}


class TrainStep:
    """(state, frozen, batch) -> (state, metrics), jitted.

    The state is donated and keeps its shardings. Call it within `jax.set_mesh(mesh)`: the model's activations are
    sharded over the mesh of the context.

    `encode`: (frozen, batch) -> what the job adds to the batch, split over the mesh as it is.
    `update`: see make_update.
    """

    def __init__(
        self,
        job: Job,
        partition: Partition,
        optimizer: optax.GradientTransformation,
        config,
        mesh: Mesh,
        shapes: TrainState,
    ):
        self._split = sharding.batch_split(mesh)

        def encode(frozen: Arrays, batch: Batch) -> Batch:
            with jax.named_scope("encode"):
                return job.encode(partition.frozen_model(frozen), batch)

        self.encode = jax.jit(encode, out_shardings=self._split, compiler_options=_encode_options(mesh))
        self.update = jax.jit(
            make_update(job, partition, optimizer, config),
            donate_argnums=0,
            out_shardings=(sharding.shardings_of(shapes), sharding.replicated(mesh)),
        )
        self._encodes: bool | None = None  # whether the job adds anything to a batch; None before the first step

    def encoded(self, frozen: Any, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch and what `encode` adds to it, as shapes; arguments may be shapes too."""

        def shape(array):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._split)

        return jax.tree.map(shape, batch | jax.eval_shape(self.encode, frozen, batch))

    def __call__(self, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        if self._encodes is None:
            self._encodes = bool(jax.eval_shape(self.encode, frozen, batch))
            if self._encodes:
                encode = self.encode.lower(frozen, batch)
                update = self.update.lower(state, frozen, self.encoded(frozen, batch))
                side_by_side([encode.compile, update.compile])
        if self._encodes:
            batch = batch | self.encode(frozen, batch)
        return self.update(state, frozen, batch)


def _encode_options(mesh: Mesh) -> dict[str, int] | None:
    # XLA's level O1: the TPU compiler takes seven times as long over the autoencoder's convolutions by default, so that
    # they move 13 % fewer bytes, in a few hundredths of a step's time.
    return {"optimization_level": 19} if mesh.devices.flat[0].platform == "tpu" else None


def side_by_side(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of tasks that run at once, a thread each: compilers leave cores idle."""
    with ThreadPoolExecutor(len(tasks)) as threads:
        return [done.result() for done in [threads.submit(task) for task in tasks]]


def numeric(batch: Batch) -> dict[str, np.ndarray]:
    """The entries of a prepared batch that a step takes: arrays of numbers; texts are left out."""
    return {
        name: np.asarray(value)
        for name, value in batch.items()
        if isinstance(value, np.ndarray | jax.Array) and value.dtype.kind not in "OSU"
    }
