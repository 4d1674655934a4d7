"""The router: from a query to one coefficient for each member of the basis (method.md §4)."""

import jax
import jax.numpy as jnp

from lorweb_jax.common.errors import UserError


def coefficients(
    query_bq: jax.Array,
    keys_nk: jax.Array,
    projection_kq: jax.Array | None,
    *,
    heads: int,
    activation: str,
    reduction: str,
) -> jax.Array:
    """Eq. 5 (method.md §4): c [b, n] = mean or sum over heads of act((P q)_h · keys_h / √(k/h)), in float32.

    `activation` "softmax" (over n) or "tanh"; `reduction` "mean", or "sum" clipped to the activation's range.
    """
    query = query_bq.astype(jnp.float32)
    if projection_kq is not None:
        query = jnp.einsum("bq,kq->bk", query, projection_kq.astype(jnp.float32))
    b, k = query.shape
    query_bhx = query.reshape(b, heads, k // heads)
    keys_nhx = keys_nk.astype(jnp.float32).reshape(-1, heads, k // heads)
    scores_bhn = jnp.einsum("bhx,nhx->bhn", query_bhx, keys_nhx) / jnp.sqrt(k / heads)
    weights_bhn = jax.nn.softmax(scores_bhn, axis=-1) if activation == "softmax" else jnp.tanh(scores_bhn)
    if reduction == "mean":
        return weights_bhn.mean(axis=1)
    return jnp.clip(weights_bhn.sum(axis=1), 0.0 if activation == "softmax" else -1.0, 1.0)


def internal_query(x: jax.Array, text_tokens: int, mode: str, pooling: str) -> jax.Array:
    """The layer's own input, pooled over the tokens that `mode` names: [b, s, i] or [b, i] -> [b, i].

    "aa'bb'" takes all, leading text tokens included (as recorded: golden case e). The others leave out `text_tokens`
    leading tokens; the first half of the rest is the noisy image, the second the condition, m tokens in raster order:
    "caa'bb'" takes all m, "caa'b" the first 3·⌊m/4⌋, "caa'" the first ⌊m/2⌋. A modulation's input [b, i] is used as
    it is. UserError where m is too small for any token to be taken.
    """
    if x.ndim == 2:
        return x
    if mode != "aa'bb'":
        x = x[:, text_tokens:]
        x = x[:, x.shape[1] // 2 :]
        m = x.shape[1]
        kept = {"caa'bb'": m, "caa'b": 3 * (m // 4), "caa'": m // 2}[mode]
        if not kept:
            raise UserError(
                f"the query mode {mode!r} takes none of the {m} tokens that a layer has of its condition; "
                "give larger images or a longer text, or use the mode aa'bb'"
            )
        x = x[:, :kept]
    return x.mean(axis=1) if pooling == "avg" else x.max(axis=1)
