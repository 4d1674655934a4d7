"""Mixes: points in the space that the members of a basis span; what `Pipeline.edit` and `Pipeline.save_lora` take.

m1, m2 = pipeline.coefficients(*analogy_1), pipeline.coefficients(*analogy_2)
image = pipeline.edit(*analogy_1, mix=Mix.lerp(m1, m2, 0.3))
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.finite import require_finite
from lorweb_jax.settings.rules import Real, as_value, shown

_FACTOR = Real(-1e30, 1e30)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Mix:
    """The coefficients c [l, n] of every adapted stack of l layers, for the n members of one basis (method.md §3).

    `Pipeline.coefficients` makes the mix that the router chooses for an analogy, `Pipeline.mix` one of a single member,
    of a named row or of arrays. Mixes are added, subtracted, scaled and interpolated; the update of a layer's weights
    is linear in its mix. Combining mixes of different bases raises UserError.

    coefficients: {path of a stack: c [l, n]}, finite numbers; stored as read-only float32 arrays.
    basis: the fingerprint of the basis that they belong to (`Basis.fingerprint`).
    """

    coefficients: Mapping[str, np.ndarray]
    basis: str

    __array_ufunc__ = None  # numpy's scalars leave `number * mix` to __rmul__

    def __post_init__(self):
        if not isinstance(self.coefficients, Mapping) or not self.coefficients:
            raise UserError(f"the coefficients of a mix are {shown(self.coefficients)}; give {{path: numbers [l, n]}}")
        arrays = {path: _as_float32(path, array) for path, array in self.coefficients.items()}
        object.__setattr__(self, "coefficients", MappingProxyType(arrays))

    @staticmethod
    def lerp(a: "Mix", b: "Mix", t: float) -> "Mix":
        """(1 − t)·a + t·b: exactly a at t = 0 and b at t = 1; t outside 0..1 extrapolates."""
        t = as_value(t, "t", _FACTOR)
        return (1 - t) * _as_mix(a) + t * _as_mix(b)

    def __add__(self, other: "Mix") -> "Mix":
        if _as_mix(other).basis != self.basis or other.coefficients.keys() != self.coefficients.keys():
            raise UserError(
                f"mixes of two bases, {self.basis} and {other.basis}, can't be combined; make both by a pipeline with "
                "the same basis"
            )
        with np.errstate(over="ignore"):  # refused by the constructor
            return Mix({path: c + other.coefficients[path] for path, c in self.coefficients.items()}, self.basis)

    def __radd__(self, other: Any) -> "Mix":
        return self if isinstance(other, int) and other == 0 else _as_mix(other) + self  # sum() begins with 0

    def __mul__(self, factor: float) -> "Mix":
        factor = np.float32(as_value(factor, "the factor of a mix", _FACTOR))
        with np.errstate(over="ignore"):
            return Mix({path: factor * c for path, c in self.coefficients.items()}, self.basis)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Mix":
        divisor = as_value(divisor, "the divisor of a mix", _FACTOR)
        if not divisor:
            raise UserError("a mix can't be divided by 0; give another number")
        return self * (1 / divisor)

    def __neg__(self) -> "Mix":
        return self * -1

    def __sub__(self, other: "Mix") -> "Mix":
        return self + -_as_mix(other)

    def __repr__(self) -> str:
        layers = sum(len(c) for c in self.coefficients.values())
        members = next(iter(self.coefficients.values())).shape[1]
        return f"<Mix of {members} members for {layers} layers, basis {self.basis}>"


def _as_mix(value: Any) -> Mix:
    if not isinstance(value, Mix):
        raise UserError(f"{shown(value)} is no Mix; make one by `Pipeline.coefficients` or `Pipeline.mix`")
    return value


def _as_float32(path: Any, values: Any) -> np.ndarray:
    """A read-only array [l, n]; UserError for what isn't one of finite numbers."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of unequal length
        raise UserError(f"the coefficients of {shown(path)} are no array ({error}); give numbers [l, n]") from None
    if array.dtype.kind not in "fiu" and array.dtype != ml_dtypes.bfloat16 or array.ndim != 2:
        raise UserError(
            f"the coefficients of {shown(path)} are {list(array.shape)} of {array.dtype}; give numbers [l, n]"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    require_finite(array, f"the coefficients of {path}", "give finite ones")
    array.flags.writeable = False
    return array
