"""Frozen linear layers in 8 bit: codes [.., i, o] with float32 scales beside them.

    W ≈ codes · scale     int8: a scale [.., 1, o] for each output channel, max|W| / 127 over its inputs; to nearest
                          fp8 (e4m3): one [.., 1, 1] for the kernel, the next power of two above max|W| / 448

e4m3 is a floating-point format: within 15 binades a number keeps three places after the first, whatever the scale. So
one scale a kernel is as precise as many, and a power of two is exact in bfloat16 and float32.

"int8" is weight-only: the product is made in the input's dtype. On hardware that multiplies fp8 (`multiplies_fp8`)
"fp8" also takes inputs [b, s, i] in fp8, and in training what comes back; elsewhere, and of vectors, it is weight-only.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.sharding import device_in_use

KINDS = ("none", "int8", "fp8")
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_SAMPLED = 8  # of so many tokens one is looked at


def quantize(kernel: Any, kind: str, largest: Any = None) -> tuple[Any, Any]:
    """(codes [.., i, o], scale float32 [.., 1, o] or [.., 1, 1]) of a kernel [.., i, o]; numpy in, numpy out, and the
    same for jax.

    largest: max|W| that the scale is made of, `largest_of` the kernel that this is a part of; by default of this one. A
    kernel or channel of zeros gets the scale 1.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(xp.float32)
    # Products with reciprocals, which XLA makes of divisions: numpy and jax then agree to the bit.
    scale = (largest_of(kernel, kind) if largest is None else largest) * xp.float32(1 / _LARGEST[kind])
    if kind == "fp8":
        scale = xp.ldexp(xp.float32(1), xp.frexp(scale)[1]).astype(xp.float32)
    scale = xp.where(scale < np.finfo(np.float32).tiny, xp.float32(1), scale)
    codes = wide * (1 / scale)
    return (xp.rint(codes) if kind == "int8" else codes).astype(DTYPES[kind]), scale


def largest_of(kernel: Any, kind: str) -> Any:
    """max|W|, float32, over what shares a scale: the inputs of a channel, or all of a kernel [.., i, o]."""
    return abs(kernel).max(-2 if kind == "int8" else (-2, -1), keepdims=True).astype(np.float32)


def scale_shape(kernel: tuple[int, ...], dtype: Any) -> tuple[int, ...]:
    """Of the scale for a kernel of this shape [.., i, o] and codes of this dtype."""
    return (*kernel[:-2], 1, kernel[-1] if dtype == DTYPES["int8"] else 1)


def dequantize(codes: Any, scale: Any) -> Any:
    """The float32 kernel [.., i, o] that codes and scale stand for."""
    return codes.astype(np.float32) * scale


@jax.custom_vjp
def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """x [.., i] times the kernel that codes [i, o] and scale [1, o] or [1, 1] stand for: [.., o] in x's dtype.

    Codes and scale are frozen. Where fp8 is multiplied, x is rounded to e4m3 as it is, what lies beyond ±448 being
    clipped, and dy, for the gradient of x, with a scale: a power of two near its root mean square.
    """
    if _multiplied(x, codes):
        return _fp8_product(x, jnp.float32(1), codes, scale, axis=0)
    return _scaled(x @ codes.astype(x.dtype), scale[0])


def _multiplied(x: jax.Array, codes: jax.Array) -> bool:
    """Whether x is rounded to be multiplied in fp8. Vectors [b, i] aren't: they take as long as reading the kernel
    does. Nor is float16, to which small gradients' scales are too small."""
    return codes.dtype == DTYPES["fp8"] and x.ndim > 2 and x.dtype != jnp.float16 and multiplies_fp8()


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales stay float32: one rounded to bfloat16 would bend a whole channel by up to 0.4 %."""
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def _fp8_product(x: jax.Array, x_scale: jax.Array, codes: jax.Array, scale: jax.Array, axis: int) -> jax.Array:
    """x [.., k] times codes · scale, whose `axis` is k; scales are scalars, powers of two."""
    limit, contracted = _LARGEST["fp8"], (((x.ndim - 1,), (axis,)), ((), ()))
    rounded = jnp.clip(x * (1 / x_scale).astype(x.dtype), -limit, limit).astype(codes.dtype)
    if device_in_use().platform == "tpu":
        y = jax.lax.dot_general(rounded, codes, contracted, preferred_element_type=jnp.float32)
        return (y * (x_scale * scale.reshape(()))).astype(x.dtype)
    # As cuBLASLt's products of fp8 are recognised, with what is added to them and done to them after: each side
    # dequantised.
    return jax.lax.dot_general(
        rounded.astype(x.dtype) * x_scale.astype(x.dtype),
        codes.astype(x.dtype) * scale.reshape(()).astype(x.dtype),
        contracted,
    )


def _power_of_two(dy: jax.Array) -> jax.Array:
    """[], between once and twice the root mean square of every eighth token of dy [b, s, o]. A largest value would have
    to be found in a pass over all of dy, ahead of that which rounds it."""
    root = jnp.sqrt(jnp.square(dy[:, ::_SAMPLED].astype(jnp.float32)).mean())
    return jnp.where(root > 0, jnp.ldexp(jnp.float32(1), jnp.frexp(root)[1]), 1)


def _forward(x, codes, scale):
    # Left to itself, the derivative would keep the codes in x's dtype for the way back: a dequantised stack in a scan.
    return product(x, codes, scale), (codes, scale)


def _backward(kept, dy):
    codes, scale = kept
    if _multiplied(dy, codes):
        return _fp8_product(dy, _power_of_two(dy), codes, scale, axis=1), None, None
    return _scaled(dy, scale[0]) @ codes.astype(dy.dtype).T, None, None


product.defvjp(_forward, _backward)


def as_multiplied(array: Any) -> Any:
    """The array, or a shape; a kernel [i, o] of e4m3 codes with its inputs side by side in the memory of an NVIDIA GPU,
    which multiplies fp8 only so: else each product would have it transposed first."""
    if array.dtype != DTYPES["fp8"] or array.ndim != 2 or isinstance(array, jax.core.Tracer):
        return array
    if device_in_use().platform not in ("gpu", "cuda") or not multiplies_fp8():
        return array
    where = Format(Layout((1, 0)), array.sharding or SingleDeviceSharding(jax.local_devices()[0]))
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)
    return jax.device_put(array, where)


def multiplies_fp8() -> bool:
    """Whether the devices in use multiply e4m3: NVIDIA from compute capability 8.9 (Ada, Hopper), TPU v7.

    Asked of the mesh in context, so that compiling for a topology elsewhere gets what will run there.
    """
    device = device_in_use()
    if device.platform == "tpu":
        return "7" in device.device_kind
    if device.platform in ("gpu", "cuda"):
        capability = getattr(device, "compute_capability", None) or jax.local_devices()[0].compute_capability
        return tuple(map(int, str(capability).split("."))) >= (8, 9)
    return False


def check(kind: str) -> None:
    """UserError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise UserError(f"quantization is {kind!r}; it must be one of {', '.join(KINDS)}", 2)


def bytes_by_dtype(arrays: Any) -> str:
    """Such as "11.6 GB int8, 0.4 GB bfloat16", largest first, of a tree of arrays or shapes (whole, not a device's).

    Says so where fp8 is stored but not multiplied.
    """
    totals: dict[np.dtype, int] = {}
    for leaf in jax.tree.leaves(arrays):
        dtype = jnp.dtype(leaf.dtype)
        totals[dtype] = totals.get(dtype, 0) + leaf.size * dtype.itemsize

    def size(value: int) -> str:
        return f"{value / 1e9:.1f} GB" if value >= 1e8 else f"{value / 1e6:.1f} MB"

    listed = ", ".join(
        f"{size(value)} {dtype.name}" for dtype, value in sorted(totals.items(), key=lambda item: -item[1])
    )
    stored_only = DTYPES["fp8"] in totals and not multiplies_fp8()
    return listed + " (this hardware does not multiply fp8: products are in the compute dtype)" * stored_only
