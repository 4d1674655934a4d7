"""The flow-matching loss: z_t = (1 − t)·x0 + t·ε, target ε − x0 (method.md §5)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Noised(NamedTuple):
    """A batch of noised examples: z_t, the target velocity ε − x0, t in 0..1 and the loss's weights."""

    tokens_bsc: jax.Array
    target_bsc: jax.Array
    time_b: jax.Array
    weight_b: jax.Array


def add_noise(x0_bsc: jax.Array, noise_bsc: jax.Array, time_b: jax.Array) -> jax.Array:
    """z_t = (1 − t)·x0 + t·ε [b, s, c], for t [b] in 0..1."""
    t = time_b[:, None, None]
    return (1.0 - t) * x0_bsc + t * noise_bsc


def draw(
    key: jax.Array, x0_bsc: jax.Array, timesteps: jax.Array | np.ndarray, weights: jax.Array | np.ndarray
) -> Noised:
    """Noise x0 by a Gaussian ε, each example at a t of its own.

    timesteps: [1000], in 1..1000, drawn from uniformly by index; t is a thousandth of them. weights: [1000], the loss's
    weight by the same index (see `schedule.train_weights`).
    """
    index_key, noise_key = jax.random.split(key)
    index = jax.random.randint(index_key, (x0_bsc.shape[0],), 0, timesteps.shape[0])
    noise = jax.random.normal(noise_key, x0_bsc.shape, jnp.float32)
    time = jnp.asarray(timesteps)[index] / 1000.0
    return Noised(add_noise(x0_bsc, noise, time), noise - x0_bsc, time, jnp.asarray(weights)[index])


def weighted_mse(velocity_bsc: jax.Array, target_bsc: jax.Array, weight_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss, loss by example [b]): the squared error's mean over tokens and channels, times the weight; in float32."""
    error = jnp.square(velocity_bsc.astype(jnp.float32) - target_bsc.astype(jnp.float32))
    per_example = error.mean(axis=(1, 2)) * weight_b
    return per_example.mean(), per_example
