"""TPU kernels between a layer's features [b, s, d] and heads [b, h, s, a], the order that TPU attention wants.

There XLA turns an array of features into one of heads by two or more copies, norms it in three passes and rotates it by
rolls of its own, each a trip through HBM. A kernel reads and writes once, and all the rest stays in registers. A
sequence may come in several parts (text, image), which are never joined in HBM but as heads.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

WIDTH = 128  # of a head: the lanes of a register
_ROWS = (256, 128)  # tokens of a kernel's step, the first that divides every part
_GROUP = 12  # heads of a kernel's step, at most; the groups are what two cores of a chip share
Parts = tuple[jax.Array, ...]
Rope = tuple[jax.Array, jax.Array]


def fits(lengths: Sequence[int], head_dim: int) -> bool:
    """Whether the kernels take parts of these lengths."""
    return head_dim == WIDTH and all(length % _ROWS[-1] == 0 for length in lengths)


@jax.custom_vjp
def split(parts: Parts) -> jax.Array:
    """Parts [b, s_p, h·a] -> [b, h, Σ s_p, a]."""
    return _split(parts)


split.defvjp(
    lambda parts: (_split(parts), tuple(part.shape[1] for part in parts)), lambda lengths, dy: (_merge(dy, lengths),)
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def merge(x: jax.Array, lengths: tuple[int, ...]) -> Parts:
    """`split`'s inverse: [b, h, Σ lengths, a] -> parts [b, length, h·a]."""
    return _merge(x, lengths)


merge.defvjp(lambda x, lengths: (_merge(x, lengths), None), lambda lengths, _, dy: (_split(dy),))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normed(parts: Parts, scales: Parts, rope: Rope, factor: float, eps: float = 1e-6) -> jax.Array:
    """factor · rope(RMSNorm(x)) by heads, in float32 up to the result: parts [b, s_p, h·a], each with a scale [a],
    cos and sin [Σ s_p, a/2] of neighbouring channels -> [b, h, Σ s_p, a].

    No gradient reaches `rope`.
    """
    return _split(parts, scales, rope, factor, eps)


def _normed_forward(parts, scales, rope, factor, eps):
    return _split(parts, scales, rope, factor, eps), (parts, scales, rope)


def _normed_backward(factor, eps, kept, dy):
    parts, scales, rope = kept
    lengths = tuple(part.shape[1] for part in parts)
    dx = _merge(dy, lengths, parts, scales, rope, factor, eps)
    return dx, _of_scales(parts, scales, rope, factor, eps, dy), None


normed.defvjp(_normed_forward, _normed_backward)


def _of_scales(parts: Parts, scales: Parts, rope: Rope, factor: float, eps: float, dy: jax.Array) -> Parts:
    """The gradient of the scales, by XLA, which leaves it out where scales are frozen."""
    unscaled = _merge(dy, tuple(part.shape[1] for part in parts), None, None, rope, factor, eps)

    def of_part(x, dn, scale):
        x, dn = (y.reshape(*y.shape[:2], -1, WIDTH).astype(jnp.float32) for y in (x, dn))
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
        return (x * dn).sum((0, 1, 2)).astype(scale.dtype)

    return tuple(map(of_part, parts, unscaled, scales))


def _turned(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """(x₀ cos − x₁ sin, x₁ cos + x₀ sin) for neighbouring lanes of x [rows, a]; cos and sin twice in neighbours."""
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
    partner = jnp.where(even, -pltpu.roll(x, WIDTH - 1, 1), pltpu.roll(x, 1, 1))
    return x * cos + partner * sin


class _Grid:
    """What both kernels share: steps over examples, groups of heads and blocks of tokens, the innermost one part after
    the other. While another part's turn lasts, a part's block stays as it was: it is neither fetched nor written."""

    def __init__(self, b: int, heads: int, lengths: Sequence[int], dtype: jnp.dtype):
        self.heads = next(size for size in range(min(_GROUP, heads), 0, -1) if heads % size == 0)
        self.rows = next(
            rows
            for rows in _ROWS[jnp.dtype(dtype).itemsize > 2 :]  # wider ones have room for half as many
            if all(length % rows == 0 for length in lengths)
        )
        counts = [length // self.rows for length in lengths]
        self.ends = list(itertools.accumulate(counts))
        self.starts = [end - count for end, count in zip(self.ends, counts)]
        self.shape = (b, heads // self.heads, self.ends[-1])
        self.features = [self._part(start, count) for start, count in zip(self.starts, counts)]
        self.by_head = pl.BlockSpec((1, self.heads, self.rows, WIDTH), lambda b, g, i: (b, g, i, 0))
        self.table = pl.BlockSpec((self.rows, WIDTH), lambda b, g, i: (i, 0))
        self.scale = pl.BlockSpec((1, WIDTH), lambda b, g, i: (0, 0))
        self.bytes = b * heads * sum(lengths) * WIDTH * jnp.dtype(dtype).itemsize

    def _part(self, start: int, count: int) -> pl.BlockSpec:
        block = (1, self.rows, self.heads * WIDTH)
        return pl.BlockSpec(block, lambda b, g, i: (b, jnp.clip(i - start, 0, count - 1), g))

    def each(self, body) -> None:
        """In a kernel: `body(part, head, lanes)` of the part whose turn it is, for every head of the group."""
        i = pl.program_id(2)
        for part, (start, end) in enumerate(zip(self.starts, self.ends)):

            @pl.when((start <= i) & (i < end))
            def _(part=part):
                @pl.loop(0, self.heads)
                def _(head):
                    body(part, head, pl.ds(pl.multiple_of(head * WIDTH, WIDTH), WIDTH))

    def call(self, kernel, inputs, in_specs, out_specs, out_shape, arrays: int):
        """arrays: how many as large as x are read and written."""
        return pl.pallas_call(
            kernel,
            grid=self.shape,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=arrays * self.bytes),
        )(*inputs)


def _tables(rope: Rope) -> list[jax.Array]:
    return [jnp.repeat(part, 2, axis=-1) for part in rope]


def _rows(scales: Parts | None, factor: float) -> list[jax.Array]:
    return [factor * scale.astype(jnp.float32)[None] for scale in scales or ()]


def _split(
    parts: Parts, scales: Parts | None = None, rope: Rope | None = None, factor: float = 1.0, eps: float = 1e-6
) -> jax.Array:
    b, _, d = parts[0].shape
    lengths, heads, dtype = [part.shape[1] for part in parts], d // WIDTH, parts[0].dtype
    grid = _Grid(b, heads, lengths, dtype)
    tables, rows = _tables(rope) if rope else [], _rows(scales, factor)

    def kernel(*refs):
        *refs, out = refs
        x, tables, scales = refs[: len(parts)], refs[len(parts) : len(refs) - len(rows)], refs[len(refs) - len(rows) :]

        def body(part, head, lanes):
            if not scales:
                out[0, head] = x[part][0, :, lanes]
                return
            y = x[part][0, :, lanes].astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scales[part][...]
            out[0, head] = _turned(y, tables[0][...], tables[1][...]).astype(dtype)

        grid.each(body)

    return grid.call(
        kernel,
        [*parts, *tables, *rows],
        [*grid.features, *[grid.table] * len(tables), *[grid.scale] * len(rows)],
        grid.by_head,
        jax.ShapeDtypeStruct((b, heads, sum(lengths), WIDTH), dtype),
        2,
    )


def _merge(
    dy: jax.Array,
    lengths: Sequence[int],
    parts: Parts | None = None,
    scales: Parts | None = None,
    rope: Rope | None = None,
    factor: float = 1.0,
    eps: float = 1e-6,
) -> Parts:
    """dy by heads as features; with a rope turned back, and with parts the gradient of what `normed` makes of them."""
    b, heads, _, _ = dy.shape
    grid = _Grid(b, heads, lengths, dy.dtype)
    tables, rows, x = _tables(rope) if rope else [], _rows(scales, factor), list(parts or ())

    def kernel(*refs):
        dy, refs, out = refs[0], list(refs[1 : -len(lengths)]), refs[-len(lengths) :]
        turns, scales, x = ([refs.pop(0) for _ in given] for given in (tables, rows, parts or ()))

        def body(part, head, lanes):
            z = dy[0, head]
            if turns:
                z = _turned(z.astype(jnp.float32), turns[0][...], -turns[1][...])
                z = z * scales[part][...] if scales else z * factor
            if x:
                y = x[part][0, :, lanes].astype(jnp.float32)
                inverse = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
                y = y * inverse
                z = inverse * (z - y * (y * z).mean(-1, keepdims=True))
            out[part][0, :, lanes] = z.astype(out[part].dtype)

        grid.each(body)

    return tuple(
        grid.call(
            kernel,
            [dy, *tables, *rows, *x],
            [grid.by_head, *[grid.table] * len(tables), *[grid.scale] * len(rows), *(grid.features if x else ())],
            grid.features,
            [jax.ShapeDtypeStruct((b, length, heads * WIDTH), dy.dtype) for length in lengths],
            3 if x else 2,
        )
    )
