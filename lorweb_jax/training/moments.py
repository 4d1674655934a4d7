"""Adam with moments stored in bfloat16 or in 8 bit: 4 or 2.1 bytes a parameter where float32 takes 8.

Moments are computed in float32 and rounded when they are stored after a step: up where the distance from the code below
exceeds a threshold of the number's own, else down. The thresholds are a low-discrepancy sequence: a number's first one
is drawn from seed and path, and each step adds the golden ratio modulo 1, so that any few steps cover 0..1 evenly. So
changes smaller than a code, such as v's 1 % a step, are kept on average, and the error stays below that of independent
stochastic rounding (measured: 0.6 against 0.8 % of a step's length in bfloat16, 1.1 with rounding to nearest; 2.4
against 3.0 % in 8 bit). Thresholds depend on seed, path and step count alone, so that a resumed run is exact.

8 bit, in blocks of at most 128 numbers along the longer of the last two axes, each with a float32 scale:

    v = scale · (code / 255)⁴, code 0..255        nine decades below a block's largest; steps of 1.6 % at the top
    m = scale · √v · code / 127, code −127..127   in units of √v, as the update uses it: a block's small gradients
                                                  are kept as well as its large ones
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorweb_jax.settings.seeds import random_key

_BLOCK = 128  # numbers that share a scale, at most (more where the axis has a larger odd factor)
_POWER = 4  # of v's code: √v by 2 loses what is far below a block's largest, by 3 nearly as good as by 4
_GOLDEN = 0x9E37  # 2¹⁶ times the golden ratio's fraction

Moments = tuple[jax.Array, jax.Array]  # m, v


class AdamState(NamedTuple):
    """`moments`: {name: {path: array}}; codes have the parameter's shape, scales one entry a block on one axis."""

    count: jax.Array
    moments: dict[str, dict[str, jax.Array]]


def scale_by_adam(b1: float, b2: float, kind: str, seed: int, eps: float = 1e-8) -> optax.GradientTransformation:
    """optax.scale_by_adam for parameters {path: array}, moments kept as `kind`, "bfloat16" or "int8"."""
    pack, unpack = {"bfloat16": (_pack_bfloat16, _unpack_bfloat16), "int8": (_pack_int8, _unpack_int8)}[kind]

    def init(params):
        def zeros(array, dtype=jnp.float32):
            return jnp.zeros(array.shape, dtype)

        packed = {
            path: pack(*map(zeros, (array, array)), *[zeros(array, jnp.uint32)] * 2) for path, array in params.items()
        }
        return AdamState(jnp.zeros([], jnp.int32), _by_name(packed))

    def update(updates, state, params=None):
        count = state.count + 1
        directions, packed = {}, {}
        for path, gradient in updates.items():
            m, v = unpack({name: arrays[path] for name, arrays in state.moments.items()})
            m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * jnp.square(gradient)
            directions[path] = m / (1 - b1**count) / (jnp.sqrt(v / (1 - b2**count)) + eps)
            key = jax.random.fold_in(random_key(seed), zlib.crc32(f"moments {path}".encode()))
            packed[path] = pack(m, v, *_thresholds(jax.random.bits(key, gradient.shape, jnp.uint32), count))
        return directions, AdamState(count, _by_name(packed))

    return optax.GradientTransformation(init, update)


def _by_name(packed: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, jax.Array]]:
    """{path: {name: array}} -> {name: {path: array}}, so that the path comes last, where sharding looks for it."""
    names = next(iter(packed.values()))
    return {name: {path: parts[name] for path, parts in packed.items()} for name in names}


def _thresholds(bits: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Thresholds of m and of v as multiples of 2⁻¹⁶, from 16 of each number's 32 random bits: uint32 below 2¹⁶."""
    moved = count.astype(jnp.uint32) * _GOLDEN
    return (bits >> 16) + moved & 0xFFFF, bits + moved & 0xFFFF


def _pack_bfloat16(m: jax.Array, v: jax.Array, for_m: jax.Array, for_v: jax.Array) -> dict[str, jax.Array]:
    return {"m": _to_bfloat16(m, for_m), "v": _to_bfloat16(v, for_v)}


def _unpack_bfloat16(packed: dict[str, jax.Array]) -> Moments:
    return packed["m"].astype(jnp.float32), packed["v"].astype(jnp.float32)


def _to_bfloat16(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """x rounded to bfloat16: the threshold is added to the 16 bits that are dropped, and may carry."""
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold
    return jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _pack_int8(m: jax.Array, v: jax.Array, for_m: jax.Array, for_v: jax.Array) -> dict[str, jax.Array]:
    for_m, for_v = (threshold.astype(jnp.float32) / 2**16 for threshold in (for_m, for_v))

    v_scale = _largest(v)
    share = v * _inverse(_spread(v_scale, v))
    below = jnp.clip(jnp.floor(255 * share ** (1 / _POWER)), 0, 254)
    low, high = _v_share(below), _v_share(below + 1)
    code = below + (for_v * (high - low) < share - low)
    # What isn't zero stays above zero: with a small v forgotten, the next small gradient would make a full step.
    v_codes = jnp.where(share > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8)

    steps = m * _inverse(jnp.sqrt(_unpack_v(v_codes, v_scale)))
    m_scale = _largest(jnp.abs(steps))
    m_codes = jnp.floor(127 * steps * _inverse(_spread(m_scale, m)) + for_m)
    return {"m": jnp.clip(m_codes, -127, 127).astype(jnp.int8), "m_scale": m_scale, "v": v_codes, "v_scale": v_scale}


def _unpack_int8(packed: dict[str, jax.Array]) -> Moments:
    v = _unpack_v(packed["v"], packed["v_scale"])
    return _spread(packed["m_scale"], v) * jnp.sqrt(v) * (packed["m"].astype(jnp.float32) / 127), v


def _unpack_v(codes: jax.Array, scale: jax.Array) -> jax.Array:
    return _spread(scale, codes) * _v_share(codes.astype(jnp.float32))


def _v_share(codes: jax.Array) -> jax.Array:
    return (codes / 255) ** _POWER


def _inverse(x: jax.Array) -> jax.Array:
    """1/x, but 0 where x is 0 or subnormal."""
    small = x < jnp.finfo(jnp.float32).tiny
    return jnp.where(small, 0, 1 / jnp.where(small, 1, x))


def _blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """(axis, block) for a parameter's shape: blocks lie along the longer of the last two axes.

    A block takes the axis's whole odd factor, so that the number of blocks is a power of two and goes on dividing
    over the devices of a mesh where the axis does.
    """
    axis = len(shape) - 1 - (len(shape) > 1 and shape[-2] > shape[-1])
    length = shape[axis]
    block = length // (length & -length)
    while 2 * block <= _BLOCK and length % (2 * block) == 0:
        block *= 2
    return axis, block


def _largest(x: jax.Array) -> jax.Array:
    """Each block's largest: [.., length, ..] -> [.., length / block, ..]."""
    if not x.shape:
        return x
    axis, block = _blocks(x.shape)
    return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]).max(axis + 1)


def _spread(scale: jax.Array, x: jax.Array) -> jax.Array:
    """A block's scale at each of its numbers, for x of the parameter's shape."""
    if not x.shape:
        return scale
    axis, block = _blocks(x.shape)
    return jnp.repeat(scale, block, axis=axis)
