"""Conversion between 8-bit images and the floats that models compute on."""

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.nn.sharding import to_host


def to_float(image: jax.Array | np.ndarray) -> jax.Array:
    """uint8 -> float32 in −1..1; traceable."""
    return jnp.asarray(image).astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: jax.Array) -> np.ndarray:
    """−1..1 -> uint8 on the host, rounded to the nearest level as diffusers does."""
    return to_host(jnp.round(jnp.clip(image / 2 + 0.5, 0.0, 1.0) * 255.0)).astype(np.uint8)
