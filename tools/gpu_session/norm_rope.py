"""A trial: RMSNorm and rope of q and k in one pass over memory each way, as a Triton kernel, where XLA takes two.

Parts [b, s_p, h·a] as the projections make them become heads [b, Σ s_p, h, a], the order that cuDNN's attention takes.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from lorweb_jax.nn.head_major import WIDTH

_ROWS, _GROUP, _WARPS = 4, 8, 4  # tokens and heads, at most, of a program, and its warps


def fits(parts, head_dim):
    """Whether the kernel takes them."""
    return head_dim == WIDTH and all(part.shape[1] % _ROWS == 0 for part in parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normed(parts, scales, rope, eps):
    """rope(RMSNorm(x)), in float32 up to the result: parts [b, s_p, h·a], each with a scale [a], cos and sin
    [Σ s_p, a/2] of neighbouring channels -> [b, Σ s_p, h, a]. No gradient reaches scales and rope."""
    b, _, d = parts[0].shape
    grid = _Grid(b, d // WIDTH, [part.shape[1] for part in parts])

    def kernel(*refs):
        x, (cos, sin), scales, out = refs[: len(parts)], refs[len(parts) :][:2], refs[len(parts) + 2 : -1], refs[-1]

        def body(part):
            y, _ = _rms_normed(x[part][0], eps)
            out[0] = _turned(y * scales[part][0][None, None], cos[...], sin[...]).astype(out.dtype)

        grid.each(body)

    shape = jax.ShapeDtypeStruct((b, grid.tokens, grid.heads, WIDTH), parts[0].dtype)
    inputs = [*map(_by_head, parts), *rope, *_rows(scales)]
    specs = [*grid.parts, grid.table, grid.table, *[grid.scale] * len(scales)]
    return grid.call(kernel, inputs, specs, grid.whole, shape)


def _forward(parts, scales, rope, eps):
    return normed(parts, scales, rope, eps), (parts, scales, rope)


def _backward(eps, kept, dy):
    parts, scales, rope = kept
    b, _, d = parts[0].shape
    grid = _Grid(b, d // WIDTH, [part.shape[1] for part in parts])

    def kernel(*refs):
        dy, x, refs = refs[0], refs[1 : 1 + len(parts)], refs[1 + len(parts) :]
        (cos, sin), scales, out = refs[:2], refs[2 : 2 + len(parts)], refs[-len(parts) :]

        def body(part):
            z = _turned(dy[0].astype(jnp.float32), cos[...], -sin[...]) * scales[part][0][None, None]
            y, inverse = _rms_normed(x[part][0], eps)
            mean = ((y * z).sum(-1) / WIDTH)[..., None]
            out[part][0] = (inverse * (z - y * mean)).astype(out[part].dtype)

        grid.each(body)

    inputs = [dy, *map(_by_head, parts), *rope, *_rows(scales)]
    specs = [grid.whole, *grid.parts, grid.table, grid.table, *[grid.scale] * len(scales)]
    shapes = [jax.ShapeDtypeStruct(_by_head(part).shape, part.dtype) for part in parts]
    dx = grid.call(kernel, inputs, specs, grid.parts, shapes)
    return tuple(each.reshape(part.shape) for each, part in zip(dx, parts)), None, None


normed.defvjp(_forward, _backward)


def _by_head(part):
    return part.reshape(*part.shape[:2], -1, WIDTH)


def _rows(scales):
    return [scale.astype(jnp.float32)[None] for scale in scales]


def _rms_normed(x, eps):
    """(x / √(mean x² + eps), 1 / √(mean x² + eps)), x [rows, heads, a]."""
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt((x * x).sum(-1) / WIDTH + eps)[..., None]
    return x * inverse, inverse


def _turned(x, cos, sin):
    """(x₀ cos − x₁ sin, x₁ cos + x₀ sin) for neighbouring channels of x [rows, heads, a]; cos and sin [rows, a/2]."""
    cos, sin = cos[:, None], sin[:, None]
    real, imaginary = jnp.unstack(x.reshape(*x.shape[:2], WIDTH // 2, 2), axis=-1)
    turned = jnp.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.reshape(x.shape)


class _Grid:
    """Programs over examples, groups of heads and blocks of tokens, part after part."""

    def __init__(self, b, heads, lengths):
        self.heads, self.tokens = heads, sum(lengths)
        group = math.gcd(heads, _GROUP)
        counts = [length // _ROWS for length in lengths]
        self.ends = list(itertools.accumulate(counts))
        self.starts = [end - count for end, count in zip(self.ends, counts)]
        self.shape = (b, heads // group, self.ends[-1])
        block = (1, _ROWS, group, WIDTH)
        self.parts = [
            pl.BlockSpec(block, lambda b, g, i, start=start, count=count: (b, jnp.clip(i - start, 0, count - 1), g, 0))
            for start, count in zip(self.starts, counts)
        ]
        self.whole = pl.BlockSpec(block, lambda b, g, i: (b, i, g, 0))
        self.table = pl.BlockSpec((_ROWS, WIDTH // 2), lambda b, g, i: (i, 0))
        self.scale = pl.BlockSpec((1, WIDTH), lambda b, g, i: (0, 0))

    def each(self, body):
        """In a kernel: `body(part)` of the part that the program's tokens belong to."""
        if len(self.starts) == 1:
            body(0)
            return
        i = pl.program_id(2)
        for part, (start, end) in enumerate(zip(self.starts, self.ends)):
            pl.when((start <= i) & (i < end))(functools.partial(body, part))

    def call(self, kernel, inputs, in_specs, out_specs, out_shape):
        return pl.pallas_call(
            kernel,
            grid=self.shape,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            interpret=jax.default_backend() != "gpu",
            compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        )(*inputs)
