"""One step of training, as pure functions that training/loop.py runs and planning compiles without any array.

A step is two programs: `encode`, what frozen parts alone make of the batch, and `update`, of each phase the loss, its
gradient and the update of its trainables. Apart, they compile side by side, and the first leaves nothing in the
second's memory.

A phase that begins later makes a second `update`, with it, which is compiled when it begins. The alternative, one
program with a conditional, would have accelerators wait for its predicate in every step; so a step that leaves a phase
out costs, needs and logs nothing of it, and what is planned is the program of all phases, as it runs.
"""

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.processes.compiler_flags import step_options
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.job import Batch, Job, Phase
from lorweb_jax.training.optimizer import moving_average
from lorweb_jax.training.state import Arrays, Partition, TrainState

Metrics = dict[str, jax.Array]


def active(job: Job, step: int | None = None) -> tuple[str, ...]:
    """Names of the phases that run in the step with index `step`, in order; None: in the last of an endless run.

    UserError where there are none.
    """
    names = tuple(phase.name for phase in job.phases() if step is None or phase.start <= step)
    if not names:
        raise UserError(f"no phase of the job runs in step {step}, counted from 0; let one of them start at 0")
    return names


def make_update(
    job: Job, partition: Partition, optimizer: optax.GradientTransformation, config, names: Sequence[str] | None = None
) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]:
    """The pure function (state, frozen, batch) -> (state, metrics): one update by each phase of the job.

    names: of the phases that run; None for all. Each phase's gradient is the mean of those of config.train.accumulate
    micro-batches, taken before any of its trainables change; the next phase sees the same micro-batches and draws. All
    randomness of a step comes from config.seed and state.step. Metrics: "loss" and "gradient_norm" (before clipping),
    with what the job's loss adds; of a job with several phases these by "<phase>/<name>", and "loss", their sum (with
    Job.joint also "gradient_norm" of all).
    """
    phases = [phase for phase in job.phases() if names is None or phase.name in names]
    count, several = config.train.accumulate, len(job.phases()) > 1

    def differentiated(phase: Phase, state: TrainState, trainable: Arrays, frozen: Arrays, batch: Batch):
        """(metrics, gradient of the phase's trainables)."""
        key = jax.random.fold_in(random_key(config.seed), state.step)
        subset = {path: trainable[path] for path in partition.paths(phase)}

        def of_part(batch: Batch, key: jax.Array):
            def loss_of(subset: Arrays):
                with jax.named_scope("loss"):
                    return phase.loss(partition.model(trainable | subset | state.constants, frozen), batch, key)

            return jax.value_and_grad(loss_of, has_aux=True)(subset)

        if count == 1:
            (loss, metrics), gradient = of_part(batch, key)
        else:

            def add(total, part):
                number, batch = part
                values, gradient = of_part(batch, jax.random.fold_in(key, number))
                return jax.tree.map(jnp.add, total, gradient), values

            parts = jnp.arange(count), micro_batches(batch, count)
            total, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, subset), parts)
            gradient = jax.tree.map(lambda x: x / count, total)
            loss, metrics = jax.tree.map(lambda x: x.mean(0), values)
        return {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradient)}, gradient

    def applied(phase: Phase, state: TrainState, trainable: Arrays, gradient: Arrays):
        """(updated trainables of the phase, its optimizer state)."""
        subset = {path: trainable[path] for path in gradient}
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradient, state.optimizer[phase.name], subset)
            updates = {path: job.rate(path) * each for path, each in updates.items()}
            return optax.apply_updates(subset, updates), opt_state

    def update(state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        trainable, opt_states = state.trainable, dict(state.optimizer)
        by_phase, gradients, overall = {}, {}, {}
        if job.joint:
            for phase in phases:
                with jax.named_scope(phase.name):
                    by_phase[phase.name], gradients[phase.name] = differentiated(phase, state, trainable, frozen, batch)
            overall["gradient_norm"] = optax.tree.norm(gradients)
            gradients, _ = optax.clip_by_global_norm(config.optimizer.clip).update(gradients, optax.EmptyState())
        for phase in phases:
            with jax.named_scope(phase.name):
                if not job.joint:
                    by_phase[phase.name], gradients[phase.name] = differentiated(phase, state, trainable, frozen, batch)
                updated, opt_states[phase.name] = applied(phase, state, trainable, gradients[phase.name])
            trainable = trainable | updated
        average = state.average
        if average is not None:
            with jax.named_scope("average"):
                average = moving_average(average, trainable, state.step, config.train.ema)
        metrics = _joined(by_phase) | overall if several else by_phase[phases[0].name]
        return TrainState(state.step + 1, trainable, average, opt_states, state.constants), metrics

    return update


def _joined(by_phase: dict[str, Metrics]) -> Metrics:
    named = {f"{phase}/{name}": value for phase, metrics in by_phase.items() for name, value in metrics.items()}
    return {"loss": sum(metrics["loss"] for metrics in by_phase.values()), **named}


def micro_batches(batch: Batch, count: int) -> Batch:
    """Arrays [b, …] as [count, b / count, …]: micro-batch i has rows i, i + count and so on, so that each device keeps
    its own rows."""

    def parts(array: jax.Array) -> jax.Array:
        array = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
        return sharding.constrain(array, None, sharding.BATCH, *[None] * (array.ndim - 2))

    return jax.tree.map(parts, batch)


class TrainStep:
    """(index of the step, state, frozen, batch) -> (state, metrics), jitted.

    The state is donated and keeps its shardings. Call it within `jax.set_mesh(mesh)`: the model's activations are
    sharded over the mesh of the context.

    `encode`: (frozen, batch) -> what the job adds to the batch, split over the mesh as it is.
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
        options = step_options(mesh)
        count = config.train.accumulate

        def encode(frozen: Arrays, batch: Batch) -> Batch:
            model = partition.frozen_model(frozen)
            with jax.named_scope("encode"):
                if count == 1:
                    return job.encode(model, batch)
                parts = jax.lax.map(lambda part: job.encode(model, part), micro_batches(batch, count))
                return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(-1, *array.shape[2:]), parts)

        def update(names: tuple[str, ...]):
            return jax.jit(
                make_update(job, partition, optimizer, config, names),
                donate_argnums=0,
                out_shardings=(sharding.shardings_of(shapes), sharding.replicated(mesh)),
                compiler_options=options or None,
            )

        self.encode = jax.jit(encode, out_shardings=self._split, compiler_options=_encode_options(mesh))
        self._job, self._update = job, functools.cache(update)
        self._encodes: bool | None = None  # whether the job adds anything to a batch; None before the first step

    def update(self, step: int | None = None) -> Callable[[TrainState, Arrays, Batch], tuple[TrainState, Metrics]]:
        """`make_update` of the phases that run in this step, jitted; None: of all phases."""
        return self._update(active(self._job, step))

    def encoded(self, frozen: Any, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch and what `encode` adds to it, as shapes; arguments may be shapes too."""

        def shape(array):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._split)

        return jax.tree.map(shape, batch | jax.eval_shape(self.encode, frozen, batch))

    def __call__(self, step: int, state: TrainState, frozen: Arrays, batch: Batch) -> tuple[TrainState, Metrics]:
        update = self.update(step)
        if self._encodes is None:
            self._encodes = bool(jax.eval_shape(self.encode, frozen, batch))
            if self._encodes:
                lowered = self.encode.lower(frozen, batch), update.lower(state, frozen, self.encoded(frozen, batch))
                side_by_side([part.compile for part in lowered])
        if self._encodes:
            batch = batch | self.encode(frozen, batch)
        return update(state, frozen, batch)


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
