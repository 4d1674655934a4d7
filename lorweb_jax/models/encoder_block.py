"""The pre-norm transformer block of CLIP's and SigLIP's towers. Letters: b batch, s and t tokens, d width.

Names of layers are transformers'; `rows` and `block_rows` are their part of a conversion table.
"""

from collections.abc import Callable
from typing import Protocol

import jax
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.table import LINEAR, Row
from lorweb_jax.nn.layers import LayerNorm, Linear

Activation = Callable[[jax.Array], jax.Array]


class Sizes(Protocol):
    """What a tower's config says of its blocks."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def layer_norm_eps(self) -> float: ...


def require_heads(config: Sizes, tower: str) -> None:
    """UserError for heads that don't divide the width of `tower`, such as "a CLIP tower"."""
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{tower} of width {config.hidden_size} has {config.num_attention_heads} heads, expected a number that "
            "divides the width; copy config.json again from where the model came from"
        )


class Attention(nnx.Module):
    """Multi-head attention of queries [b, t, d] over keys [b, s, d]; `causal`: over those up to a query's own place."""

    def __init__(self, config: Sizes, causal: bool = False, *, rngs: nnx.Rngs):
        self.heads, self.causal = config.num_attention_heads, causal
        self.q_proj = Linear(config.hidden_size, config.hidden_size, role="any", rngs=rngs)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, role="any", rngs=rngs)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, role="any", rngs=rngs)
        self.out_proj = Linear(config.hidden_size, config.hidden_size, role="any", rngs=rngs)

    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)
            for project, x in ((self.q_proj, queries), (self.k_proj, keys), (self.v_proj, keys))
        )
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(queries.shape))


class FeedForward(nnx.Module):
    """fc2(activation(fc1 x))."""

    def __init__(self, config: Sizes, activation: Activation, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, role="any", rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, role="any", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nnx.Module):
    """x + attention(norm x), then x + feed forward(norm x)."""

    def __init__(self, config: Sizes, activation: Activation, causal: bool = False, *, rngs: nnx.Rngs):
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.self_attn = Attention(config, causal, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.mlp = FeedForward(config, activation, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.layer_norm1(x)
        x = x + self.self_attn(normed, normed)
        return x + self.mlp(self.layer_norm2(x))


def rows(path: str, key: str, axes: tuple[int, ...] | None = None) -> list[Row]:
    """A layer's weight and bias; `axes` None for a norm."""
    weight = "scale" if axes is None else "kernel"
    return [Row(f"{path}.{weight}", f"{key}.weight", axes), Row(f"{path}.bias", f"{key}.bias")]


def block_rows(tower: str) -> list[Row]:
    """All blocks of a tower and its position embedding."""
    layer = f"{tower}.encoder.layers.{{l}}."
    return [
        Row("position_embedding.embedding", f"{tower}.embeddings.position_embedding.weight"),
        *[
            row
            for part in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "self_attn.out_proj",
                "mlp.fc1",
                "mlp.fc2",
            )
            for row in rows(f"layers.{part}", layer + part, LINEAR)
        ],
        *[row for part in ("layer_norm1", "layer_norm2") for row in rows(f"layers.{part}", layer + part)],
    ]
