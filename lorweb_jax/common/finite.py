"""Checks for NaN and infinity, which would end in a picture that is black all over."""

import ml_dtypes
import numpy as np

from lorweb_jax.common.errors import UserError

# Bits that are all set in whatever is not a finite number, by dtype.
_SET = {
    "float64": 0x7FF << 52,
    "float32": 0xFF << 23,
    "float16": 0x1F << 10,
    "bfloat16": 0xFF << 7,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x1F << 2,
}
_AT_ONCE = 1 << 18  # numbers, so that they stay in the processor's cache


def is_finite(array: np.ndarray) -> bool:
    """Whether an array of any real dtype holds neither not-a-number nor infinity; whole numbers never do."""
    if array.dtype.name not in _SET:
        return bool(np.isfinite(array).all()) if array.dtype.kind in "fc" else True
    mask = np.dtype(f"u{array.itemsize}").type(_SET[array.dtype.name])
    bits = np.ascontiguousarray(array).reshape(-1).view(mask.dtype)
    return not any(((bits[start : start + _AT_ONCE] & mask) == mask).any() for start in range(0, bits.size, _AT_ONCE))


def require_finite(array: np.ndarray, what: str, remedy: str) -> None:
    """UserError, which says what kind and how many, unless the array is finite."""
    if is_finite(array):
        return
    wide = array.astype(np.float32) if array.dtype.itemsize < 4 or array.dtype == ml_dtypes.bfloat16 else array
    nans, infinite = int(np.isnan(wide).sum()), int(np.isinf(wide).sum())
    kinds = " and ".join([f"not-a-number in {nans:,}"] * bool(nans) + [f"infinity in {infinite:,}"] * bool(infinite))
    raise UserError(f"{what} holds {kinds} of {array.size:,} places; {remedy}")
