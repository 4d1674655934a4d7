"""The optimizer that a config describes: AdamW with a clipped gradient, and the average of the weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_schedule(config) -> optax.Schedule:
    """step -> learning rate: linear rise over `warmup` steps, then constant or a cosine down to 0 at train.steps."""
    optimizer, steps = config.optimizer, config.train.steps
    if optimizer.schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(
            0.0 if optimizer.warmup else optimizer.learning_rate, optimizer.learning_rate, optimizer.warmup, steps)
    if optimizer.warmup:
        return optax.linear_schedule(0.0, optimizer.learning_rate, optimizer.warmup)
    return optax.constant_schedule(optimizer.learning_rate)


def make_optimizer(config) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; with config.train.ema its state also holds the averaged weights."""
    optimizer = config.optimizer
    adamw = optax.adamw(make_schedule(config), b1=optimizer.b1, b2=optimizer.b2, weight_decay=optimizer.weight_decay)
    parts = [optax.clip_by_global_norm(optimizer.clip), adamw]
    if config.train.ema:
        parts.append(average_weights(config.train.ema))
    return optax.chain(*parts)


class AverageState(NamedTuple):
    count: jax.Array
    average: Any


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps average ← d·average + (1 − d)·weights in the optimizer's state; must come last in a chain.

    d = min(decay, (1 + step) / (10 + step)), so that the first weights are soon forgotten.
    """
    def init(params):
        return AverageState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates, state, params):
        d = jnp.minimum(decay, (1 + state.count) / (10 + state.count))
        average = jax.tree.map(lambda a, p, u: d * a + (1 - d) * (p + u), state.average, params, updates)
        return updates, AverageState(state.count + 1, average)

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any) -> Any | None:
    """The averaged weights in an optimizer's state, or None where none are kept."""
    return optax.tree.get(opt_state, "average")
