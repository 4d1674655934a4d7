"""One update of the trainables, as a pure function that train.py jits and plan.py compiles without any array."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lorweb_jax import sharding
from lorweb_jax.training.job import Batch, Job
from lorweb_jax.training.state import Arrays, Layout, StateShapes


def make_train_step(job: Job, layout: Layout, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """The pure step (trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics).

    `step` is the step's index, uint32; all randomness of a step comes from it and from `seed`.
    """
    def train_step(trainable: Arrays, opt_state: Any, frozen: Arrays, batch: Batch, step: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), step)

        def loss_of(trainable: Arrays):
            return job.loss(layout.model(trainable, frozen), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, opt_state, {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradient)}

    return train_step


def jit_train_step(job: Job, layout: Layout, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh,
                   shapes: StateShapes) -> Callable:
    """`make_train_step`, jitted: trainables and optimizer state are donated and keep their shardings.

    Call and lower it within `jax.set_mesh(mesh)`: the model's activations are placed by the mesh of the context.
    """
    kept = sharding.shardings_of((shapes.trainable, shapes.opt_state))
    return jax.jit(make_train_step(job, layout, optimizer, seed), donate_argnums=(0, 1),
                   out_shardings=(*kept, sharding.copied(mesh)))


def numeric(batch: Batch) -> dict[str, np.ndarray]:
    """The entries of a prepared batch that a step takes: arrays of numbers; texts are left out."""
    return {name: np.asarray(value) for name, value in batch.items()
            if isinstance(value, np.ndarray | jax.Array) and value.dtype.kind not in "OSU"}
