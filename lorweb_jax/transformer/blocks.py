"""FLUX's two kinds of block and its last layer, each reading like its equations.

`add` is a dictionary from the name of a linear layer in the block to what is added to that layer's product.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.layers import Addition, Linear, RMSNorm, layer_norm
from lorweb_jax.transformer.embeddings import rotate

Additions = dict[str, Addition]


def modulate(x: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array) -> jax.Array:
    """LN(x) · (1 + scale) + shift, x [b, s, d]."""
    return layer_norm(x) * (1 + scale_bd[:, None]) + shift_bd[:, None]


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Modulation(nnx.Module):
    """`count` vectors [b, d] from the conditioning vector [b, d]."""

    def __init__(self, features: int, count: int, *, rngs: nnx.Rngs):
        self.count = count
        # Zero at the start, so that a block trained from scratch begins as the identity (adaLN-Zero).
        self.linear = Linear(features, count * features, init=jax.nn.initializers.zeros, rngs=rngs)

    def __call__(self, vector_bd: jax.Array, addition: Addition | None = None) -> list[jax.Array]:
        return jnp.split(self.linear(jax.nn.silu(vector_bd), addition), self.count, axis=-1)


class FeedForward(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.net_0_proj = Linear(features, 4 * features, rngs=rngs)
        self.net_2 = Linear(4 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array, add: Additions, name: str) -> jax.Array:
        hidden = gelu(self.net_0_proj(x, add.get(f"{name}.net_0_proj")))
        return self.net_2(hidden, add.get(f"{name}.net_2"))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rope, implementation: str) -> jax.Array:
    """Full attention over the sequence; q, k, v [b, s, heads, a] -> [b, s, d]."""
    out = jax.nn.dot_product_attention(rotate(q, rope), rotate(k, rope), v, implementation=implementation)
    return out.reshape(*out.shape[:2], -1)


class JointAttention(nnx.Module):
    """Attention over text and image tokens together, each stream with its own projections; text comes first."""

    def __init__(self, features: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, implementation
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out_0", "to_add_out"):
            setattr(self, name, Linear(features, features, rngs=rngs))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMSNorm(features // heads, rngs=rngs))

    def __call__(self, image: jax.Array, text: jax.Array, rope, add: Additions) -> tuple[jax.Array, jax.Array]:
        def project(x, name):
            y = getattr(self, name)(x, add.get(f"attn.{name}"))
            return y.reshape(*y.shape[:2], self.heads, -1)

        q = jnp.concatenate([self.norm_added_q(project(text, "add_q_proj")), self.norm_q(project(image, "to_q"))], 1)
        k = jnp.concatenate([self.norm_added_k(project(text, "add_k_proj")), self.norm_k(project(image, "to_k"))], 1)
        v = jnp.concatenate([project(text, "add_v_proj"), project(image, "to_v")], 1)
        out = attend(q, k, v, rope, self.implementation)
        length = text.shape[1]
        return (self.to_out_0(out[:, length:], add.get("attn.to_out_0")),
                self.to_add_out(out[:, :length], add.get("attn.to_add_out")))


class DoubleBlock(nnx.Module):
    """One double-stream block: image and text have weights of their own and meet in attention."""

    def __init__(self, features: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.norm1 = Modulation(features, 6, rngs=rngs)
        self.norm1_context = Modulation(features, 6, rngs=rngs)
        self.attn = JointAttention(features, heads, implementation, rngs=rngs)
        self.ff = FeedForward(features, rngs=rngs)
        self.ff_context = FeedForward(features, rngs=rngs)

    def __call__(self, image: jax.Array, text: jax.Array, vector_bd: jax.Array, rope, add: Additions):
        """image [b, s, d], text [b, t, d] -> the same."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(vector_bd, add.get("norm1.linear"))
        (text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale,
         text_mlp_gate) = self.norm1_context(vector_bd, add.get("norm1_context.linear"))

        image_update, text_update = self.attn(
            modulate(image, shift, scale), modulate(text, text_shift, text_scale), rope, add)
        image = image + gate[:, None] * image_update
        text = text + text_gate[:, None] * text_update

        image = image + mlp_gate[:, None] * self.ff(modulate(image, mlp_shift, mlp_scale), add, "ff")
        text = text + text_mlp_gate[:, None] * self.ff_context(
            modulate(text, text_mlp_shift, text_mlp_scale), add, "ff_context")
        return image, text


class SelfAttention(nnx.Module):
    """Attention of the single-stream blocks; its output projection is part of the block's `proj_out`."""

    def __init__(self, features: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.heads, self.implementation = heads, implementation
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, Linear(features, features, rngs=rngs))
        self.norm_q = RMSNorm(features // heads, rngs=rngs)
        self.norm_k = RMSNorm(features // heads, rngs=rngs)

    def __call__(self, x: jax.Array, rope, add: Additions, text_tokens: int) -> jax.Array:
        def project(name):
            y = getattr(self, name)(x, add.get(f"attn.{name}"), text_tokens)
            return y.reshape(*y.shape[:2], self.heads, -1)

        return attend(self.norm_q(project("to_q")), self.norm_k(project("to_k")), project("to_v"), rope,
                      self.implementation)


class SingleBlock(nnx.Module):
    """One single-stream block on the joined sequence: attention and MLP side by side, then one projection."""

    def __init__(self, features: int, heads: int, implementation: str, *, rngs: nnx.Rngs):
        self.norm = Modulation(features, 3, rngs=rngs)
        self.attn = SelfAttention(features, heads, implementation, rngs=rngs)
        self.proj_mlp = Linear(features, 4 * features, rngs=rngs)
        self.proj_out = Linear(5 * features, features, rngs=rngs)

    def __call__(self, x: jax.Array, vector_bd: jax.Array, rope, add: Additions, text_tokens: int) -> jax.Array:
        """x [b, t + s, d], text first -> the same."""
        shift, scale, gate = self.norm(vector_bd, add.get("norm.linear"))
        normed = modulate(x, shift, scale)
        hidden = gelu(self.proj_mlp(normed, add.get("proj_mlp"), text_tokens))
        joined = jnp.concatenate([self.attn(normed, rope, add, text_tokens), hidden], axis=-1)
        return x + gate[:, None] * self.proj_out(joined, add.get("proj_out"), text_tokens)


class OutputNorm(nnx.Module):
    """The last modulation; diffusers keeps scale before shift here, the reverse of every block."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.linear = Linear(features, 2 * features, init=jax.nn.initializers.zeros, rngs=rngs)

    def __call__(self, x: jax.Array, vector_bd: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.linear(jax.nn.silu(vector_bd)), 2, axis=-1)
        return modulate(x, shift, scale)
