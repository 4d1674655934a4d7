"""Euler steps along the velocity from noise to an image's latents."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def euler(
    velocity: Callable[[jax.Array, Any], jax.Array], noise: jax.Array, sigmas: jax.Array, given: Any = None
) -> jax.Array:
    """z ← z + (σ' − σ) · velocity(z, σ_b) over consecutive noise levels, in one scanned loop; z stays float32.

    noise [b, s, c]; sigmas [steps + 1], descending. velocity takes z and the noise level of each example [b], or, where
    `given` is a tree of arrays [steps, …] that were computed from the levels beforehand, z and that step's part of it.
    """
    starts = jnp.asarray(sigmas)[:-1]
    if given is None:
        given = jnp.broadcast_to(starts[:, None], (*starts.shape, noise.shape[0]))

    def step(z, now):
        difference, of_step = now
        return z + difference * velocity(z, of_step).astype(z.dtype), None

    return jax.lax.scan(step, noise.astype(jnp.float32), (jnp.asarray(sigmas)[1:] - starts, given))[0]
