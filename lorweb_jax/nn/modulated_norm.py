"""A TPU kernel each way for LN(x) · (1 + scale) + shift, what each branch of a block begins with.

XLA reads x once for each statistic, forward and again in the recomputed forward, and reads x and the output's gradient
three times on the way back: for sums over features, for those over tokens, and for the result, to which it adds what
passes the branch by in one pass more. Here all are read once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lorweb_jax.nn import sharding

_ROWS = 128  # tokens of a step; so many are fetched while as many are computed
_AT_ONCE = 16  # of these in registers: as many as a register of bfloat16 has rows
_SUBLANES, _LANES = 8, 128
_TOKENS = ("batch", "tokens", None)  # axes of x


def fits(x: jax.Array) -> bool:
    """Whether the kernels take x [b, s, d] on the device in use."""
    on_tpu = sharding.device_in_use().platform == "tpu"
    return on_tpu and sharding.local_shape(x, *_TOKENS)[1] % _ROWS == 0 and x.shape[2] % _LANES == 0


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """(LN(x) · (1 + scale) + shift, x) for x [b, s, d], shift and scale [b, d]; in float32 up to the result.

    What passes the branch by should use the x that is returned: gradients of both are then added in the kernel.
    """

    def local(x, shift, scale):
        return _modulated(x, shift, scale, eps)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x, shift, scale)
    tokens = sharding.spec(mesh, _TOKENS, x.shape)
    vectors = sharding.spec(mesh, ("batch", None), shift.shape)
    specs = (tokens, vectors, vectors)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(tokens, tokens), check_vma=False)(x, shift, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _modulated(x, shift, scale, eps):
    def kernel(x, shift, scale, out):
        def write(rows):
            normed, _ = _normed(x[0, rows].astype(jnp.float32), eps)
            y = normed * (1 + scale[0].astype(jnp.float32)) + shift[0].astype(jnp.float32)
            out[0, rows] = y.astype(x.dtype)

        _each_rows(write)

    return _call(kernel, [x], [shift, scale]), x


def _modulated_forward(x, shift, scale, eps):
    return _modulated(x, shift, scale, eps), (x, shift, scale)


def _modulated_backward(eps, kept, gradients):
    x, shift, scale = kept

    def kernel(x, dy, past, scale, dx, dshift, dscale):
        dshift[...], dscale[...] = jnp.zeros_like(dshift), jnp.zeros_like(dscale)

        def write(rows):
            normed, inverse = _normed(x[0, rows].astype(jnp.float32), eps)
            given = dy[0, rows].astype(jnp.float32)
            dshift[0, 0] += _folded(given)
            dscale[0, 0] += _folded(given * normed)
            inner = given * (1 + scale[0].astype(jnp.float32))
            inner = inner - inner.mean(-1, keepdims=True) - normed * (inner * normed).mean(-1, keepdims=True)
            dx[0, rows] = (inverse * inner + past[0, rows].astype(jnp.float32)).astype(x.dtype)

        _each_rows(write)

    dx, *sums = _call(kernel, [x, *gradients], [scale], sums=2, in_place={2: 0})
    return dx, *(each.sum((1, 2)).astype(like.dtype) for each, like in zip(sums, (shift, scale)))


_modulated.defvjp(_modulated_forward, _modulated_backward)


def _each_rows(body) -> None:
    @pl.loop(0, _ROWS // _AT_ONCE)
    def _(i):
        body(pl.ds(pl.multiple_of(i * _AT_ONCE, _AT_ONCE), _AT_ONCE))


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(LN(x), 1 / √(var + eps)) of rows in registers."""
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return centred * inverse, inverse


def _folded(x: jax.Array) -> jax.Array:
    """[rows, d] -> [8, d]: sums of registers, which cost less than sums within."""
    return x.reshape(-1, _SUBLANES, x.shape[-1]).sum(0)


def _call(kernel, tokens: list[jax.Array], vectors: list[jax.Array], sums: int = 0, in_place: dict | None = None):
    """kernel(tokens [b, s, d] …, vectors [b, d] …, a result like tokens, sums …) in steps of _ROWS tokens.

    sums: how many arrays [b, steps, 8, d] of sums over a step's tokens there are, for XLA to add up: a row for each
    sublane and step, so that no step waits for another. in_place: {index of an input: of the result that takes its
    place}, which spares a scan's carry a copy.
    """
    b, s, d = tokens[0].shape
    steps, like = s // _ROWS, jax.ShapeDtypeStruct(tokens[0].shape, tokens[0].dtype)
    by_step = pl.BlockSpec((1, _ROWS, d), lambda b, i: (b, i, 0))
    by_example = pl.BlockSpec((1, 1, d), lambda b, i: (b, 0, 0))
    of_sums = pl.BlockSpec((1, 1, _SUBLANES, d), lambda b, i: (b, i, 0, 0))
    sum_shape = jax.ShapeDtypeStruct((b, steps, _SUBLANES, d), jnp.float32)
    moved = (len(tokens) + 1) * tokens[0].nbytes
    return pl.pallas_call(
        kernel,
        grid=(b, steps),
        in_specs=[*[by_step] * len(tokens), *[by_example] * len(vectors)],
        out_specs=[by_step, *[of_sums] * sums] if sums else by_step,
        out_shape=[like, *[sum_shape] * sums] if sums else like,
        input_output_aliases=in_place or {},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
    )(*tokens, *(vector[:, None] for vector in vectors))
