"""Adapters of linear layers: low-rank updates, mixed by coefficients that are known in advance (LowRankAdapter) or that
the layer's own input decides (RoutedAdapter).

Both are pytrees. Of a stack of layers every array has a leading axis l, which the scan over blocks takes off.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lorweb_jax.adapters.coefficients import Internal, RouterParameters
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Adapter, Input


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankAdapter(Adapter):
    """Eq. 4 (method.md §3), scale · Σ_n c_n · (x A_n) B_n: each example of a batch with its own coefficients c, the
    same for all its tokens.

    As two products of inner width k = n·r, as wide as the hardware likes; the updates A_n B_n [i, o] of the weights are
    never formed.
    """

    a_nir: jax.Array
    b_nro: jax.Array
    coeff_bn: jax.Array
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    def inner(self, dtype: jnp.dtype) -> jax.Array:
        """A [i, k]."""
        return _side_by_side(self.a_nir, dtype)

    def outer(self, h: jax.Array, x: Input, text_tokens: int) -> jax.Array:
        """(h · c) B for h [b, s, k] or [b, k]."""
        b = sharding.constrain(self.b_nro.astype(h.dtype), None, None, sharding.ANY)
        c = jnp.repeat(self.scale * self.coeff_bn, b.shape[1], axis=-1)
        c = jnp.expand_dims(c, tuple(range(1, h.ndim - 1))).astype(h.dtype)
        return (h * c) @ b.reshape(-1, b.shape[2])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterSum(Adapter):
    """Several adapters of one layer, whose updates add up: such as a style's beside those of a basis."""

    parts: tuple[Adapter, ...]

    def inner(self, dtype: jnp.dtype) -> jax.Array:
        """Those of the parts side by side."""
        return jnp.concatenate([part.inner(dtype) for part in self.parts], axis=1)

    def outer(self, h: jax.Array, x: Input, text_tokens: int) -> jax.Array:
        """The sum of the parts' updates."""
        widths = [jax.eval_shape(lambda part=part: part.inner(h.dtype)).shape[1] for part in self.parts]
        own = jnp.split(h, list(itertools.accumulate(widths))[:-1], axis=-1)
        return sum(part.outer(part_h, x, text_tokens) for part, part_h in zip(self.parts, own))


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
class RoutedAdapter(Adapter):
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

    def inner(self, dtype: jnp.dtype) -> jax.Array:
        """As LowRankAdapter's."""
        return _side_by_side(self.a_nir, dtype)

    def outer(self, h: jax.Array, x: Input, text_tokens: int) -> jax.Array:
        """As LowRankAdapter's with the coefficients of x."""
        return LowRankAdapter(self.a_nir, self.b_nro, self.coefficients(x, text_tokens), self.scale).outer(
            h, x, text_tokens
        )


def _side_by_side(a_nir: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[i, n·r]"""
    # Members split over devices are gathered here, one layer at a time and in the dtype of the product.
    a = sharding.constrain(a_nir.astype(dtype), None, sharding.ANY, None)
    return a.transpose(1, 0, 2).reshape(a.shape[1], -1)
