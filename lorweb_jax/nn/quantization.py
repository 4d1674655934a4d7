"""Frozen linear layers in 8 bit: codes [.., i, o] with one float32 scale [.., 1, o] for each output channel.

    W ≈ codes · scale        int8: scale = max|W| / 127 over the inputs, rounded to nearest; fp8 (e4m3): max|W| / 448

"int8" is weight-only: the product is made in the input's dtype. "fp8" also takes the input in fp8, with one scale an
example, and in training what comes back, on hardware that multiplies fp8 (`multiplies_fp8`), and is weight-only elsewhere.
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


def quantize(kernel: Any, kind: str) -> tuple[Any, Any]:
    """(codes [.., i, o], scale float32 [.., 1, o]) of a kernel [.., i, o]; numpy in, numpy out, and the same for jax.

    A channel of zeros gets the scale 1.
    """
    xp = np if isinstance(kernel, np.ndarray) else jnp
    wide = kernel.astype(xp.float32)
    # Products with reciprocals, which XLA makes of divisions: numpy and jax then agree to the bit.
    scale = abs(wide).max(-2, keepdims=True) * xp.float32(1 / _LARGEST[kind])
    scale = xp.where(scale < np.finfo(np.float32).tiny, xp.float32(1), scale)
    codes = wide * (1 / scale)
    return (xp.rint(codes) if kind == "int8" else codes).astype(DTYPES[kind]), scale


def dequantize(codes: Any, scale: Any) -> Any:
    """The float32 kernel [.., i, o] that codes and scale stand for."""
    return codes.astype(np.float32) * scale


@jax.custom_vjp
def product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """x [.., i] times the kernel that codes [i, o] and scale [1, o] stand for: [.., o] in x's dtype.

    Codes and scale are frozen. Where fp8 is multiplied, x is rounded to e4m3, and so is what comes back for the
    gradient of x: `fp8_product`.
    """
    if codes.dtype == DTYPES["fp8"] and multiplies_fp8():
        return _scaled(fp8_product(x, codes, 0), scale[0])
    return _scaled(x @ codes.astype(x.dtype), scale[0])


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales stay float32: one rounded to bfloat16 would bend a whole channel by up to 0.4 %."""
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def fp8_product(x: jax.Array, codes: jax.Array, axis: int) -> jax.Array:
    """x [b, .., k] times e4m3 codes, whose `axis` is k, in x's dtype: x is rounded to e4m3, one scale an example.

    The scale is twice the root mean square of every eighth token. e4m3 has 15 binades at three places after the first,
    so that whatever lies between 1/32 and 896 times the root mean square is rounded alike; what is larger becomes
    that, what is smaller is rounded to multiples of 1/256 of it. A largest value instead would have to be found in a pass of its own
    over x, before that which rounds it.

    Scales are applied to the product: what reads a layer's output next, a norm, an activation or a sum, reads all of it
    once and multiplies on the way, where scales of examples and channels inside the product would keep cuBLASLt from
    multiplying fp8.
    """
    tokens = x[:, ::_SAMPLED] if x.ndim > 2 else x
    square = jnp.square(tokens.astype(jnp.float32)).mean(tuple(range(1, x.ndim)), keepdims=True)
    scale = jnp.where(square > 0, 2 * jnp.sqrt(square), 1)
    largest = _LARGEST["fp8"]
    rounded = jnp.clip(x.astype(jnp.float32) * (1 / scale), -largest, largest).astype(codes.dtype)
    contracted = (((x.ndim - 1,), (axis,)), ((), ()))
    return _scaled(jax.lax.dot_general(rounded, codes, contracted, preferred_element_type=x.dtype), scale)


def _forward(x, codes, scale):
    # Left to itself, the derivative would keep the codes in x's dtype for the way back: a dequantised stack in a scan.
    return product(x, codes, scale), (codes, scale)


def _backward(kept, dy):
    codes, scale = kept
    dy = _scaled(dy, scale[0])
    if codes.dtype == DTYPES["fp8"] and multiplies_fp8():
        return fp8_product(dy, codes, 1), None, None
    return dy @ codes.astype(dy.dtype).T, None, None


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
        return tuple(map(int, str(jax.local_devices()[0].compute_capability).split("."))) >= (8, 9)
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
