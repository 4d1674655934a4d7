"""FLUX's two kinds of block and its last layer, each reading like its equations.

`linear` makes a block's linear layer of a given name, as the record says (record.py). `add` is a dictionary from the
name of a linear layer in the block to what is added to that layer's product. `mod` holds the block's modulation vectors
[b, count·d] by the name of the layer that computed them (Flux.modulations).
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lorweb_jax.models.backbone import MakeLinear
from lorweb_jax.models.flux1.embeddings import rotate
from lorweb_jax.nn import head_major, modulated_norm, sharding
from lorweb_jax.nn.attention import HEADS, Parts, attend, attend_streams
from lorweb_jax.nn.layers import HIDDEN, OUTPUTS, QKV, Adapter, Linear, RMSNorm, layer_norm, outputs

Additions = dict[str, Adapter]
Modulations = dict[str, jax.Array]


def modulate(x: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array) -> jax.Array:
    """LN(x) · (1 + scale) + shift, x [b, s, d]."""
    return layer_norm(x) * (1 + scale_bd[:, None]) + shift_bd[:, None]


def branch(x: jax.Array, shift_bd: jax.Array, scale_bd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a branch of a block begins with, and the x to which its end is added (modulated_norm.modulated)."""
    if modulated_norm.fits(x):
        return modulated_norm.modulated(x, shift_bd, scale_bd)
    return modulate(x, shift_bd, scale_bd), x


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class Modulation(nnx.Module):
    """Several vectors [b, d], side by side, from the conditioning vector [b, d]."""

    def __init__(self, linear: MakeLinear, name: str):
        # Zero at the start, so that a block trained from scratch begins as the identity (adaLN-Zero).
        self.linear = linear(f"{name}.linear", init=jax.nn.initializers.zeros)

    def __call__(self, vector_bd: jax.Array, adapter: Adapter | None = None) -> jax.Array:
        return self.linear(jax.nn.silu(vector_bd), adapter)


class FeedForward(nnx.Module):
    def __init__(self, linear: MakeLinear, name: str):
        self.net_0_proj = linear(f"{name}.net_0_proj")
        self.net_2 = linear(f"{name}.net_2")

    def __call__(self, x: jax.Array, add: Additions, name: str) -> jax.Array:
        hidden = gelu(checkpoint_name(self.net_0_proj(x, add.get(f"{name}.net_0_proj")), HIDDEN))
        hidden = sharding.constrain(hidden, "batch", "tokens", "hidden")
        return checkpoint_name(self.net_2(hidden, add.get(f"{name}.net_2")), OUTPUTS)


def by_head(parts: Parts, head_dim: int) -> list[jax.Array]:
    """[b, s_p, d] -> [b, s_p, h, a]"""
    return [sharding.constrain(part.reshape(*part.shape[:2], -1, head_dim), *HEADS) for part in parts]


def normed_heads(parts: Parts, norms: Sequence[RMSNorm], rope) -> jax.Array:
    """Parts [b, s_p, d], each normed by a norm of its own and all turned by rope -> [b, Σ s_p, h, a]."""
    normed = [norm(part) for norm, part in zip(norms, by_head(parts, norms[0].scale.shape[-1]))]
    return rotate(jnp.concatenate(normed, axis=1), rope)


def attention(
    q: Parts, k: Parts, v: Parts, norms_q: Sequence[RMSNorm], norms_k: Sequence[RMSNorm], rope, implementation: str
) -> Parts:
    """Attention over one sequence in parts, [b, s_p, d] each as the projections make them, as is the result; q and k
    are normed, each part by a norm of its own, and turned by rope.

    Where tokens are split over devices, heads are instead in here: each device sends its tokens' part of other
    devices' heads, before anything is done to them, and gets back what those made of them.
    """

    def by_tokens(parts):
        return tuple(sharding.constrain(part, "batch", "tokens", "hidden") for part in parts)

    q, k, v = (tuple(checkpoint_name(part, QKV) for part in by_tokens(parts)) for parts in (q, k, v))
    lengths, head_dim = [part.shape[1] for part in v], norms_q[0].scale.shape[-1]
    if implementation == "pallas" and head_major.fits(lengths, head_dim):
        q_scales, k_scales = (tuple(norm.scale[...] for norm in norms) for norms in (norms_q, norms_k))
        return by_tokens(attend_streams(q, k, v, q_scales, k_scales, rope, norms_q[0].eps))

    turned_q, turned_k = normed_heads(q, norms_q, rope), normed_heads(k, norms_k, rope)
    out = attend(turned_q, turned_k, jnp.concatenate(by_head(v, head_dim), axis=1), implementation)
    out = jnp.split(out.reshape(*out.shape[:2], -1), list(itertools.accumulate(lengths))[:-1], axis=1)
    return by_tokens(sharding.constrain(part, *HEADS[:3]) for part in out)


class JointAttention(nnx.Module):
    """Attention over text and image tokens together, each stream with its own projections; text comes first."""

    to_out_0: Linear
    to_add_out: Linear
    norm_q: RMSNorm
    norm_k: RMSNorm
    norm_added_q: RMSNorm
    norm_added_k: RMSNorm

    def __init__(self, linear: MakeLinear, head_dim: int, implementation: str, *, rngs: nnx.Rngs):
        self.implementation = implementation
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out_0", "to_add_out"):
            setattr(self, name, linear(f"attn.{name}"))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(self, name, RMSNorm(head_dim, rngs=rngs))

    def __call__(self, image: jax.Array, text: jax.Array, rope, add: Additions) -> tuple[jax.Array, jax.Array]:
        def projected(x, *names):
            return outputs(x, [(getattr(self, name), add.get(f"attn.{name}")) for name in names])

        q, k, v = zip(
            projected(text, "add_q_proj", "add_k_proj", "add_v_proj"), projected(image, "to_q", "to_k", "to_v")
        )
        norms_q, norms_k = (self.norm_added_q, self.norm_q), (self.norm_added_k, self.norm_k)
        text, image = attention(q, k, v, norms_q, norms_k, rope, self.implementation)
        image = self.to_out_0(image, add.get("attn.to_out_0"))
        text = self.to_add_out(text, add.get("attn.to_add_out"))
        return checkpoint_name(image, OUTPUTS), checkpoint_name(text, OUTPUTS)


class DoubleBlock(nnx.Module):
    """One double-stream block: image and text have weights of their own and meet in attention."""

    def __init__(self, linear: MakeLinear, head_dim: int, implementation: str, *, rngs: nnx.Rngs):
        self.norm1 = Modulation(linear, "norm1")
        self.norm1_context = Modulation(linear, "norm1_context")
        self.attn = JointAttention(linear, head_dim, implementation, rngs=rngs)
        self.ff = FeedForward(linear, "ff")
        self.ff_context = FeedForward(linear, "ff_context")

    def __call__(self, image: jax.Array, text: jax.Array, mod: Modulations, rope, add: Additions):
        """image [b, s, d], text [b, t, d] -> the same."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(mod["norm1"], 6, axis=-1)
        (text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate) = jnp.split(
            mod["norm1_context"], 6, axis=-1
        )

        image_branch, image = branch(image, shift, scale)
        text_branch, text = branch(text, text_shift, text_scale)
        image_update, text_update = self.attn(image_branch, text_branch, rope, add)
        image = image + gate[:, None] * image_update
        text = text + text_gate[:, None] * text_update

        image_branch, image = branch(image, mlp_shift, mlp_scale)
        text_branch, text = branch(text, text_mlp_shift, text_mlp_scale)
        image = image + mlp_gate[:, None] * self.ff(image_branch, add, "ff")
        text = text + text_mlp_gate[:, None] * self.ff_context(text_branch, add, "ff_context")
        return image, text


class SelfAttention(nnx.Module):
    """Attention of the single-stream blocks; its output projection is part of the block's `proj_out`."""

    def __init__(self, linear: MakeLinear, head_dim: int, implementation: str, *, rngs: nnx.Rngs):
        self.implementation = implementation
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, linear(f"attn.{name}"))
        self.norm_q = RMSNorm(head_dim, rngs=rngs)
        self.norm_k = RMSNorm(head_dim, rngs=rngs)

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, rope) -> jax.Array:
        """What to_q, to_k and to_v made, [b, s, d] each -> [b, s, d]."""
        [out] = attention((q,), (k,), (v,), (self.norm_q,), (self.norm_k,), rope, self.implementation)
        return out


class SingleBlock(nnx.Module):
    """One single-stream block on the joined sequence: attention and MLP side by side, then one projection."""

    def __init__(self, linear: MakeLinear, head_dim: int, implementation: str, *, rngs: nnx.Rngs):
        self.norm = Modulation(linear, "norm")
        self.attn = SelfAttention(linear, head_dim, implementation, rngs=rngs)
        self.proj_mlp = linear("proj_mlp")
        self.proj_out = linear("proj_out")

    def __call__(self, x: jax.Array, mod: Modulations, rope, add: Additions, text_tokens: int) -> jax.Array:
        """x [b, t + s, d], text first -> the same."""
        shift, scale, gate = jnp.split(mod["norm"], 3, axis=-1)
        normed, x = branch(x, shift, scale)
        layers = [
            *((getattr(self.attn, name), add.get(f"attn.{name}")) for name in ("to_q", "to_k", "to_v")),
            (self.proj_mlp, add.get("proj_mlp")),
        ]
        q, k, v, hidden = outputs(normed, layers, text_tokens)
        hidden = sharding.constrain(gelu(checkpoint_name(hidden, HIDDEN)), "batch", "tokens", "hidden")
        attended = self.attn(q, k, v, rope)
        update = checkpoint_name(self.proj_out((attended, hidden), add.get("proj_out"), text_tokens), OUTPUTS)
        return x + gate[:, None] * update


class OutputNorm(nnx.Module):
    """The last modulation; diffusers keeps scale before shift here, the reverse of every block."""

    def __init__(self, linear: MakeLinear):
        self.linear = linear("norm_out.linear", init=jax.nn.initializers.zeros)

    def vectors(self, vector_bd: jax.Array) -> jax.Array:
        """[b, 2d]"""
        return self.linear(jax.nn.silu(vector_bd))

    def __call__(self, x: jax.Array, vectors: jax.Array) -> jax.Array:
        scale, shift = jnp.split(vectors, 2, axis=-1)
        return modulate(x, shift, scale)
