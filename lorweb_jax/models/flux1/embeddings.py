"""Conditioning vector and rotary positions of FLUX, computed in float32 whatever the compute dtype."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.models.backbone import MakeLinear

SINUSOID_WIDTH = 256


def sinusoid(value_b: jax.Array, width: int = SINUSOID_WIDTH, max_period: float = 10_000.0) -> jax.Array:
    """value [b] -> [b, width], cosines first, in float32."""
    angles = value_b.astype(jnp.float32)[:, None] * _frequencies(width // 2, max_period)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _frequencies(count: int, max_period: float) -> np.ndarray:
    """max_period^(−i/count), i = 0 …, with the rounding errors of the published implementation.

    At 1000·t an angle feels the last digit of its frequency, and that digit alone moves the output by 5e-6. So
    exponents are rounded to float32 as there, and the one frequency of FLUX's 128 that the exponential used there
    (MKL's, on SSE) doesn't round to the nearest float32 is set to what the recorded outputs show (tests/golden).
    """
    exponents = np.float32(-math.log(max_period)) * np.arange(count, dtype=np.float32) / np.float32(count)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    if (count, max_period) == (128, 10_000.0):
        frequencies[12] = np.nextafter(frequencies[12], np.float32(1))
    return frequencies


class TwoLayers(nnx.Module):
    """linear_2(silu(linear_1(x)))."""

    def __init__(self, linear: MakeLinear, name: str):
        self.linear_1 = linear(f"{name}.linear_1")
        self.linear_2 = linear(f"{name}.linear_2")

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class TimeTextEmbedding(nnx.Module):
    """The vector that modulates every block: timestep + guidance + pooled text."""

    def __init__(self, linear: MakeLinear, guidance: bool):
        self.timestep_embedder = TwoLayers(linear, "time_text_embed.timestep_embedder")
        self.guidance_embedder = TwoLayers(linear, "time_text_embed.guidance_embedder") if guidance else None
        self.text_embedder = TwoLayers(linear, "time_text_embed.text_embedder")

    def __call__(
        self, timestep_b: jax.Array, guidance_b: jax.Array | None, pooled_bp: jax.Array, round_to_bfloat16: bool = False
    ) -> jax.Array:
        """timestep [b] in 0..1, guidance [b], pooled [b, p] -> [b, d] in pooled's dtype.

        `round_to_bfloat16` repeats the published pipeline's rounding of 1000·timestep and 1000·guidance, for those
        who compare images pixel by pixel (method.md §1).
        """

        def thousandfold(value):
            value = 1000.0 * value.astype(jnp.float32)
            return value.astype(jnp.bfloat16).astype(jnp.float32) if round_to_bfloat16 else value

        dtype = pooled_bp.dtype
        vector = self.timestep_embedder(sinusoid(thousandfold(timestep_b)).astype(dtype))
        if self.guidance_embedder is not None:
            vector = vector + self.guidance_embedder(sinusoid(thousandfold(guidance_b)).astype(dtype))
        return vector + self.text_embedder(pooled_bp)


def rotary(ids_s3: jax.Array, axes_dims: tuple[int, ...], theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """cos and sin [s, sum(axes_dims)/2] for position ids (t, y, x) [s, 3]; one angle for each pair of channels."""
    angles = []
    for axis, dim in enumerate(axes_dims):
        frequencies = jnp.asarray(theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim), jnp.float32)
        angles.append(ids_s3[:, axis].astype(jnp.float32)[:, None] * frequencies)
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


@jax.custom_vjp
def rotate(x_bsha: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate neighbouring channel pairs of x [b, s, heads, a] by the angles of `rotary`; in float32.

    No gradient reaches `rope`.
    """
    return jax.lax.platform_dependent(
        x_bsha, *rope, tpu=_rotate_lanes, cuda=_rotate_swapped, rocm=_rotate_swapped, default=_rotate_pairs
    )


def _rotate_forward(x, rope):
    return rotate(x, rope), rope


def _rotate_backward(rope, dy):
    # A rotation's transpose is the rotation back: as fast as the way there, where the derivative of a stack or a roll
    # is a chain of pads and slices, and nothing of one platform's form is kept for another's.
    cos, sin = rope
    return rotate(dy, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _rotate_pairs(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def _rotate_swapped(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same as (x₀, x₁) cos + (x₁, x₀) (−sin, sin), which GPUs write in one pass with what comes before."""
    cos, sin = (part[None, :, None, :, None] for part in (cos, sin))
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = pairs * cos + pairs[..., ::-1] * (sin * jnp.float32([-1, 1]))
    return turned.reshape(x.shape).astype(x.dtype)


def _rotate_lanes(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The same where the last axis lies in a register's lanes: an axis of length 2 would leave most of them empty."""
    cos, sin = (jnp.repeat(part, 2, axis=-1)[None, :, None, :] for part in (cos, sin))
    wide = x.astype(jnp.float32)
    even = jnp.arange(x.shape[-1]) % 2 == 0
    partner = jnp.where(even, -jnp.roll(wide, -1, axis=-1), jnp.roll(wide, 1, axis=-1))
    return (wide * cos + partner * sin).astype(x.dtype)
