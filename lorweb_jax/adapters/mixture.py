"""Adapters of linear layers: low-rank updates, mixed by coefficients that are known in advance (LowRankAdapter) or that
the layer's own input decides (RoutedAdapter).

Both are pytrees. Of a stack of layers every array has a leading axis l, which the scan over blocks takes off.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lorweb_jax.adapters.coefficients import Internal, RouterParameters
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Adapter, Input, parts, sum_of_products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankAdapter:
    """Eq. 4 (method.md §3), scale · Σ_n c_n · (x A_n) B_n: each example of a batch with its own coefficients c, the
    same for all its tokens."""

    a_nir: jax.Array
    b_nro: jax.Array
    coeff_bn: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __call__(self, x: Input, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] -> [b, s, o], or [b, i] -> [b, o]; in the dtype of x."""
        dtype, tokens = parts(x)[0].dtype, tuple(range(1, parts(x)[0].ndim - 1))
        # Members split over devices are gathered here, one layer at a time and in the dtype of the product.
        a = sharding.constrain(self.a_nir.astype(dtype), None, sharding.ANY, None)
        b = sharding.constrain(self.b_nro.astype(dtype), None, None, sharding.ANY)
        c = jnp.expand_dims(self.scale * self.coeff_bn, tokens).astype(dtype)
        # Eq. 4 as "bsi,nir,bn,nro->bso", or "bi,nir,bn,nro->bo", from the left to the right: two products of inner
        # width n·r, as wide as the hardware likes. The updates A_n B_n [i, o] of the weights are never formed.
        h = sum_of_products(x, a, lambda part, rows: jnp.einsum("b...i,nir->b...nr", part, rows), axis=1)
        return jnp.einsum("b...nr,nro->b...o", h * c[..., None], b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSum:
    """Several adapters of one layer, whose updates add up: such as a style's beside those of a basis."""

    parts: tuple[Adapter, ...]

    def __call__(self, x: Input, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] -> [b, s, o], or [b, i] -> [b, o]; in the dtype of x."""
        return sum(part(x, text_tokens) for part in self.parts)


def added(one: Mapping[str, Adapter] | None, other: Mapping[str, Adapter] | None) -> dict[str, Adapter] | None:
    """The adapters of both by path, summed where both adapt a layer; None where there are none at all."""
    if one is None or other is None:
        return one if other is None else dict(other)
    return {
        path: AdapterSum((one[path], other[path])) if path in one and path in other else one.get(path, other.get(path))
        for path in {**one, **other}
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedAdapter:
    """A LowRankAdapter whose coefficients are computed from the layer's own input (the internal query)."""

    a_nir: jax.Array
    b_nro: jax.Array
    keys_nk: jax.Array
    projection_ki: jax.Array | None
    log_temperature: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})
    internal: Internal = dataclasses.field(metadata={"static": True})

    def coefficients(self, x: Input, text_tokens: int = 0) -> jax.Array:
        """c [b, n] for the layer's input x."""
        parameters = RouterParameters(self.keys_nk, self.projection_ki, self.log_temperature)
        return self.internal.of_input(parameters, x, text_tokens)

    def __call__(self, x: Input, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] -> [b, s, o], or [b, i] -> [b, o]; in the dtype of x."""
        return LowRankAdapter(self.a_nir, self.b_nro, self.coefficients(x, text_tokens), self.scale)(x)
