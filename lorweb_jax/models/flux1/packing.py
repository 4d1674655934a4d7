"""Latents to tokens and back: 2x2 patches of NHWC latents, channel order as in diffusers; the tokens' position ids."""

import jax
import jax.numpy as jnp

PATCH = 2


def pack(latents_bhwc: jax.Array) -> jax.Array:
    """[b, h, w, c] -> tokens [b, (h/2)·(w/2), 4c] in raster order; in a token, c is the slowest axis."""
    b, h, w, c = latents_bhwc.shape
    patches = latents_bhwc.reshape(b, h // 2, 2, w // 2, 2, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, (h // 2) * (w // 2), 4 * c)


def unpack(tokens_bsc: jax.Array, height: int, width: int) -> jax.Array:
    """Inverse of `pack`; height and width are those of the latents."""
    b, _, c = tokens_bsc.shape
    patches = tokens_bsc.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, height, width, c // 4)


def position_ids(height: int, width: int, image: int) -> jax.Array:
    """(t, y, x) ids [s, 3] of the tokens of latents height x width; image 0 is the noisy one, 1 the condition."""
    y, x = jnp.meshgrid(jnp.arange(height // 2), jnp.arange(width // 2), indexing="ij")
    return jnp.stack([jnp.full_like(y, image), y, x], axis=-1).reshape(-1, 3).astype(jnp.float32)


def text_ids(length: int) -> jax.Array:
    """Text tokens all sit at position 0: [t, 3]."""
    return jnp.zeros((length, 3), jnp.float32)
