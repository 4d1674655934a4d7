"""What a linear layer is given: a mix of low-rank updates, for coefficients known beforehand or found on the way.

Both are pytrees; for a stack of layers every array has a leading axis l, taken off by the scan over blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lorweb_jax.adapters.router import coefficients, internal_query
from lorweb_jax.nn import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankMix:
    """scale · Σ_n c_n · (x A_n) B_n (method.md §3), the same n coefficients for every token of an example."""

    a_nir: jax.Array
    b_nro: jax.Array
    coeff_bn: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __call__(self, x: jax.Array, text_tokens: int = 0) -> jax.Array:
        """x [b, s, i] -> [b, s, o], or [b, i] -> [b, o]. Two products of inner width n·r, as wide as the hardware
        likes, instead of n narrow ones."""
        n, i, r = self.a_nir.shape
        # Members split over devices are gathered here, one layer at a time and in the dtype of the product.
        a = sharding.constrain(self.a_nir.astype(x.dtype), None, sharding.ANY, None)
        b = sharding.constrain(self.b_nro.astype(x.dtype), None, None, sharding.ANY)
        a, b = a.transpose(1, 0, 2).reshape(i, n * r), b.reshape(n * r, -1)
        coeff = jnp.repeat(self.scale * self.coeff_bn, r, axis=-1).astype(x.dtype)
        return _expand((x @ a) * (coeff if x.ndim == 2 else coeff[:, None]), b)


@jax.custom_vjp
def _expand(h: jax.Array, b_mo: jax.Array) -> jax.Array:
    """h [..., m] @ b [m, o]. The gradient of b is made as hᵀ g; jax's own rule would make its transpose gᵀ h, for which
    CPUs transpose g [..., o] in place of h, which is many times narrower."""
    return h @ b_mo


def _expand_forward(h, b_mo):
    return h @ b_mo, (h, b_mo)


def _expand_backward(kept, g):
    h, b_mo = kept
    return jnp.einsum("...o,mo->...m", g, b_mo), jnp.einsum("...m,...o->mo", h, g)


_expand.defvjp(_expand_forward, _expand_backward)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedMix:
    """A LowRankMix whose coefficients come from the layer's own input (the internal query)."""

    a_nir: jax.Array
    b_nro: jax.Array
    keys_nk: jax.Array
    projection_ki: jax.Array | None
    scale: float = dataclasses.field(metadata={"static": True})
    mode: str = dataclasses.field(metadata={"static": True})
    pooling: str = dataclasses.field(metadata={"static": True})
    heads: int = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})
    reduction: str = dataclasses.field(metadata={"static": True})

    def coefficients(self, x: jax.Array, text_tokens: int) -> jax.Array:
        """c [b, n] for the layer's input x."""
        query = internal_query(x, text_tokens, self.mode, self.pooling)
        return coefficients(
            query,
            self.keys_nk,
            self.projection_ki,
            heads=self.heads,
            activation=self.activation,
            reduction=self.reduction,
        )

    def __call__(self, x: jax.Array, text_tokens: int = 0) -> jax.Array:
        mix = LowRankMix(self.a_nir, self.b_nro, self.coefficients(x, text_tokens), self.scale)
        return mix(x, text_tokens)
