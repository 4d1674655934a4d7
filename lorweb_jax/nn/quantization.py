"""Frozen linear layers in 8 bit: codes [.., i, o] with one float32 scale [.., 1, o] for each output channel.

    W ≈ codes · scale        int8: scale = max|W| / 127 over the inputs, rounded to nearest; fp8 (e4m3): max|W| / 448

"int8" is weight-only: the product is made in the input's dtype. "fp8" also takes the input in fp8, with one scale a
token, on hardware that multiplies fp8 (`multiplies_fp8`), and is weight-only elsewhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.sharding import device_in_use

KINDS = ("none", "int8", "fp8")
DTYPES = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.float8_e4m3fn)}
_LARGEST = {"int8": 127.0, "fp8": 448.0}


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

    Codes and scale are frozen. The gradient with respect to x is the weight-only product's, whatever forward rounds.
    """
    if codes.dtype == DTYPES["fp8"] and multiplies_fp8():
        return fp8_product(x, codes, scale)
    return _scaled(x @ codes.astype(x.dtype), scale[0])


def _scaled(y: jax.Array, scale: jax.Array) -> jax.Array:
    """Scales stay float32: one rounded to bfloat16 would bend a whole channel by up to 0.4 %."""
    return (y.astype(jnp.float32) * scale).astype(y.dtype)


def fp8_product(x: jax.Array, codes: jax.Array, scale: jax.Array) -> jax.Array:
    """`product` with x rounded to e4m3, one scale max|x| / 448 a token, and sums in float32."""
    wide = x.astype(jnp.float32)
    token_scale = jnp.abs(wide).max(-1, keepdims=True) * jnp.float32(1 / _LARGEST["fp8"])
    token_scale = jnp.where(token_scale < jnp.finfo(jnp.float32).tiny, 1, token_scale)
    y = jax.lax.dot_general(
        (wide * (1 / token_scale)).astype(codes.dtype),
        codes,
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (y * token_scale * scale[0]).astype(x.dtype)


def _forward(x, codes, scale):
    # Left to itself, the derivative would keep the codes in x's dtype for the way back: a dequantised stack in a scan.
    return product(x, codes, scale), (codes, scale)


def _backward(kept, dy):
    codes, scale = kept
    return _scaled(dy, scale[0]) @ codes.astype(dy.dtype).T, None, None


product.defvjp(_forward, _backward)


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
