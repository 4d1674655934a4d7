"""One step of training, as pure functions that train.py runs and plan.py compiles without any array.

A step is two programs: `encode`, what frozen parts alone make of the batch, and `update`, the loss, its gradient and
the trainables' update. Apart, they compile side by side, and the first leaves nothing in the second's memory.
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
from lorweb_jax.training.job import Batch, Job
from lorweb_jax.training.state import Arrays, Layout, StateShapes


def make_update(job: Job, layout: Layout, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """The pure function (trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics).

    `step` is the step's index, uint32; all randomness of a step comes from it and from `seed`.
    """

    def update(trainable: Arrays, opt_state: Any, frozen: Arrays, batch: Batch, step: jax.Array):
        key = jax.random.fold_in(random_key(seed), step)

        def loss_of(trainable: Arrays):
            return job.loss(layout.model(trainable, frozen), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, opt_state, {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradient)}

    return update


class TrainStep:
    """(trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics), jitted.

    Trainables and optimizer state are donated and keep their shardings. Call it within `jax.set_mesh(mesh)`: the
    model's activations are placed by the mesh of the context.

    `encode`: (frozen, batch) -> what is added to the batch, split over the mesh as it is; None if the job has none.
    `update`: see make_update.
    """

    def __init__(
        self,
        job: Job,
        layout: Layout,
        optimizer: optax.GradientTransformation,
        seed: int,
        mesh: Mesh,
        shapes: StateShapes,
    ):
        self._split = sharding.batch_split(mesh)
        self.encode = None
        if hasattr(job, "encode"):

            def encode(frozen: Arrays, batch: Batch) -> Batch:
                return job.encode(layout.frozen_model(frozen), batch)

            self.encode = jax.jit(encode, out_shardings=self._split, compiler_options=_encode_options(mesh))
        kept = sharding.shardings_of((shapes.trainable, shapes.opt_state))
        self.update = jax.jit(
            make_update(job, layout, optimizer, seed),
            donate_argnums=(0, 1),
            out_shardings=(*kept, sharding.replicated(mesh)),
        )
        self._compiled = False

    def encoded(self, frozen: Any, batch: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """The batch and what `encode` adds to it, as shapes; arguments may be shapes too."""

        def shape(array):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=self._split)

        return jax.tree.map(shape, batch | jax.eval_shape(self.encode, frozen, batch))

    def __call__(self, trainable: Arrays, opt_state: Any, frozen: Arrays, batch: Batch, step: np.uint32):
        if self.encode:
            if not self._compiled:
                side_by_side(
                    [
                        self.encode.lower(frozen, batch).compile,
                        self.update.lower(trainable, opt_state, frozen, self.encoded(frozen, batch), step).compile,
                    ]
                )
                self._compiled = True
            batch = batch | self.encode(frozen, batch)
        return self.update(trainable, opt_state, frozen, batch, step)


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
