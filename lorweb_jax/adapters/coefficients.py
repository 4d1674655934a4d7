"""What decides the coefficients of a basis. `BasisConfig.coefficients` is one of these, and nothing else asks which.

    Routed     an embedding of the analogy's images, before the model runs: the external query of method.md §4
    Internal   each layer's own input, while the model runs: the internal query
    Fixed      a table of rows by name: no router

The rest of the package asks them three things:

    from_images   whether they need an image encoder's embedding of the analogy
    in_advance    whether they are known before the model runs: once for an analogy, so that their mix can be folded
    has_router    whether layers have keys and, as the config says, a projection
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from lorweb_jax.adapters.router import Router, internal_query
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Input, parts
from lorweb_jax.settings.rules import shown


class RouterParameters(NamedTuple):
    """Of a stack of layers: keys [l, n, k], projection [l, k, q] or None, log_temperature [l] where it is learnt."""

    keys: jax.Array
    projection: jax.Array | None
    log_temperature: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Routed:
    """Coefficients from a query of width `query_dim` that an image encoder makes of an analogy, see queries.py."""

    from_images: ClassVar = True
    in_advance: ClassVar = True
    has_router: ClassVar = True

    router: Router
    query_mode: str
    query_dim: int | None

    def query_width(self, inputs: int) -> int | None:
        """q for a layer of so many inputs; None until the image encoder is known."""
        return self.query_dim

    def of_stacks(
        self, parameters: Mapping[str, RouterParameters], query_bq: jax.Array, temperature_b: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """c [l, b, n] of every stack. A query of several tokens [b, tokens, width] is flattened.

        temperature_b: what scores are divided by besides, of each example, while it is annealed.
        Raises UserError for a query of another width than `query_dim`.
        """
        query_bq = query_bq.reshape(query_bq.shape[0], -1)
        if query_bq.shape[1] != self.query_dim:
            raise UserError(
                f"the query is {query_bq.shape[1]} wide and the basis expects {self.query_dim} "
                f"({self.query_mode}); use the image encoder and query mode that it was trained with"
            )
        # Rows are few, projections many: rows travel, and every device works with its share of k.
        query_bq = sharding.constrain(query_bq, "vectors", None)

        def stack(*of_layers):
            c = jax.vmap(lambda *of_layer: self.router(query_bq, *of_layer, temperature_b))(*of_layers)
            return sharding.constrain(c, None, "batch", None)

        return {path: stack(*arrays) for path, arrays in parameters.items()}


@dataclasses.dataclass(frozen=True)
class Internal:
    """Coefficients that each layer makes of its own input, pooled over the tokens that `query_mode` names."""

    from_images: ClassVar = False
    in_advance: ClassVar = False
    has_router: ClassVar = True

    router: Router
    query_mode: str
    pooling: str

    def query_width(self, inputs: int) -> int:
        return inputs

    def of_input(self, parameters: RouterParameters, x: Input, text_tokens: int) -> jax.Array:
        """c [b, n] for one layer's input x [b, s, i] or [b, i], whose first tokens are text."""
        query = [internal_query(part, text_tokens, self.query_mode, self.pooling) for part in parts(x)]
        return self.router(jnp.concatenate(query, axis=-1), *parameters)


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Coefficients from a table: rows of n numbers by name, such as content (1, 0), style (0, 1) and both (1, 1).

    The first row is what is used where none is named.
    """

    from_images: ClassVar = False
    in_advance: ClassVar = True
    has_router: ClassVar = False

    table: tuple[tuple[str, tuple[float, ...]], ...]

    @property
    def default(self) -> str:
        return self.table[0][0]

    def rows(self, names: Sequence[Any]) -> jax.Array:
        """c [b, n], a named row for each example of a batch. UserError for a name that the table hasn't got."""
        table = dict(self.table)
        for name in names:
            if name not in table:
                raise UserError(f"there is no mix {shown(name)} in this basis; it has {', '.join(table)}")
        return jnp.asarray([table[name] for name in names], jnp.float32)


Coefficients = Routed | Internal | Fixed
