"""The router: from a query to one coefficient for each member of the basis (method.md §4)."""

import dataclasses

import jax
import jax.numpy as jnp

from lorweb_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Router:
    """Eq. 5 (method.md §4), c = mean or sum over heads of act((P q)_h · keys_h / √(k/h)).

    heads: h, a divisor of k. activation: "softmax" over the n members, or "tanh". reduction: "mean" over heads, or
    "sum" clipped to the activation's range.

    Not of the published method, and off by default: normalised, (P q)_h and keys_h are brought to a root mean square of
    1, so that a score is √(k/h) times their cosine; temperature, what scores are divided by.
    """

    heads: int
    activation: str
    reduction: str
    normalised: bool = False
    temperature: float = 1.0

    def __call__(
        self,
        query_bq: jax.Array,
        keys_nk: jax.Array,
        projection_kq: jax.Array | None,
        log_temperature: jax.Array | None = None,
        temperature_b: jax.Array | None = None,
    ) -> jax.Array:
        """c [b, n], float32.

        projection_kq: None takes the query as it is, q = k. log_temperature []: of the layer, where it is learnt.
        temperature_b: of each example, while it is annealed. Scores are divided by all temperatures there are.
        """
        query, h = query_bq.astype(jnp.float32), self.heads
        if projection_kq is not None:
            query = jnp.einsum("bq,kq->bk", query, projection_kq.astype(jnp.float32))
        b, k = query.shape
        query_bhx = query.reshape(b, h, k // h)
        keys_nhx = keys_nk.astype(jnp.float32).reshape(-1, h, k // h)
        if self.normalised:
            query_bhx, keys_nhx = _unit_mean_square(query_bhx), _unit_mean_square(keys_nhx)
        scores_bhn = jnp.einsum("bhx,nhx->bhn", query_bhx, keys_nhx) / jnp.sqrt(k / h)
        if self.temperature != 1.0:
            scores_bhn = scores_bhn / self.temperature
        if log_temperature is not None:
            scores_bhn = scores_bhn * jnp.exp(-log_temperature.astype(jnp.float32))
        if temperature_b is not None:
            scores_bhn = scores_bhn / temperature_b[:, None, None]
        weights_bhn = jax.nn.softmax(scores_bhn, axis=-1) if self.activation == "softmax" else jnp.tanh(scores_bhn)
        if self.reduction == "mean":
            return weights_bhn.mean(axis=1)
        return jnp.clip(weights_bhn.sum(axis=1), 0.0 if self.activation == "softmax" else -1.0, 1.0)


def _unit_mean_square(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-12)


def internal_query(x: jax.Array, text_tokens: int, mode: str, pooling: str) -> jax.Array:
    """The layer's own input, pooled over the tokens that `mode` names: [b, s, i] or [b, i] -> [b, i].

    "aa'bb'" takes all, leading text tokens included (as recorded: golden case e). The others leave out `text_tokens`
    leading tokens; the first half of the rest is the noisy image, the second the condition, m tokens in raster order:
    "caa'bb'" takes all m, "caa'b" the first 3·⌊m/4⌋, "caa'" the first ⌊m/2⌋. A modulation's input [b, i] is used as
    it is. Raises UserError where m is too small for any token to be taken.
    """
    if x.ndim == 2:
        return x
    if mode != "aa'bb'":
        x = x[:, text_tokens:]
        x = x[:, x.shape[1] // 2 :]
        m = x.shape[1]
        count = {"caa'bb'": m, "caa'b": 3 * (m // 4), "caa'": m // 2}[mode]
        if not count:
            raise UserError(
                f"the query mode {mode!r} takes none of the {m} tokens that a layer has of its condition; "
                "give larger images or a longer text, or use the mode aa'bb'"
            )
        x = x[:, :count]
    return x.mean(axis=1) if pooling == "avg" else x.max(axis=1)
