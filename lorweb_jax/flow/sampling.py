"""Euler steps along the velocity from noise to an image's latents."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def euler(velocity: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, sigmas: jax.Array) -> jax.Array:
    """z ← z + (σ' − σ) · velocity(z, σ_b) over consecutive noise levels, in one scanned loop; z stays float32.

    noise [b, s, c]; sigmas [steps + 1], descending; velocity takes z and the noise level of each example [b].
    """
    def step(z, levels):
        sigma, following = levels
        v = velocity(z, jnp.full((z.shape[0],), sigma))
        return z + (following - sigma) * v.astype(z.dtype), None

    levels = jnp.stack([sigmas[:-1], sigmas[1:]], axis=-1)
    return jax.lax.scan(step, noise.astype(jnp.float32), levels)[0]
