"""Other ways to compute the same step, tried on the device before they become the code's own.

Each is a set of replacements that hold while a step is traced (`applied`); results equal the code's to rounding.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorweb_jax.models.flux1 import blocks
from lorweb_jax.models.flux1 import model as flux
from lorweb_jax.models.flux1.blocks import gelu, modulate
from lorweb_jax.nn import layers, sharding

_TARGETS = {
    "rotate": (blocks, "rotate"),
    "attend": (blocks, "attend"),
    "scan_stack": (flux, "scan_stack"),
    "product": (layers, "product"),
    "joint": (blocks.JointAttention, "__call__"),
    "feed_forward": (blocks.FeedForward, "__call__"),
    "single": (blocks.SingleBlock, "__call__"),
}


@contextlib.contextmanager
def applied(names):
    """The named variants in the code's place while the body runs."""
    replaced = {}
    for name in names:
        replaced |= VARIANTS[name]()
    before = {key: getattr(*_TARGETS[key]) for key in replaced}
    try:
        for key, value in replaced.items():
            setattr(*_TARGETS[key], value)
        yield
    finally:
        for key, value in before.items():
            setattr(*_TARGETS[key], value)


def policy(names, attention=True):
    """Keeps values of these names and, with `attention`, what cuDNN's forward attention returns."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def keeps(primitive, *args, **parameters):
        if attention and primitive.name.startswith("dot_product_attention_fwd"):
            return True
        return named(primitive, *args, **parameters)

    return keeps


def _rope_flipped():
    def rotate(x, rope):
        cos, sin = (part[None, :, None, :, None] for part in rope)
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        turned = pairs * cos + pairs[..., ::-1] * (sin * jnp.asarray([-1.0, 1.0]))
        return turned.reshape(x.shape).astype(x.dtype)

    return {"rotate": rotate}


def _low_rank_of_parts(mix, parts):
    n, i, r = mix.a_nir.shape
    dtype = parts[0].dtype
    a = mix.a_nir.astype(dtype).transpose(1, 0, 2).reshape(i, n * r)
    start, h = 0, 0
    for part in parts:
        h = h + part @ a[start : start + part.shape[-1]]
        start += part.shape[-1]
    coeff = jnp.repeat(mix.scale * mix.coeff_bn, r, axis=-1).astype(dtype)
    return (h * coeff[:, None]) @ mix.b_nro.astype(dtype).reshape(n * r, -1)


def _split_proj_out():
    def single(self, x, mod, rope, add, text_tokens):
        shift, scale, gate = jnp.split(mod["norm"], 3, axis=-1)
        normed = modulate(x, shift, scale)
        hidden = gelu(self.proj_mlp(normed, add.get("proj_mlp"), text_tokens))
        hidden = sharding.constrain(hidden, "batch", None, "hidden")
        attended = self.attn(normed, rope, add, text_tokens)
        kernel = self.proj_out.kernel[...].astype(x.dtype)
        d = attended.shape[-1]
        y = attended @ kernel[:d] + hidden @ kernel[d:] + self.proj_out.bias[...].astype(x.dtype)
        if "proj_out" in add:
            y = y + _low_rank_of_parts(add["proj_out"], (attended, hidden))
        return x + gate[:, None] * checkpoint_name(y, "outputs")

    return {"single": single}


def _named_outputs():
    joint, feed_forward = blocks.JointAttention.__call__, blocks.FeedForward.__call__

    def named_joint(self, *args, **kwargs):
        return tuple(checkpoint_name(y, "outputs") for y in joint(self, *args, **kwargs))

    def named_feed_forward(self, *args, **kwargs):
        return checkpoint_name(feed_forward(self, *args, **kwargs), "outputs")

    return {"joint": named_joint, "feed_forward": named_feed_forward}


def _named_qkv():
    attend = blocks.attend

    def named(q, k, v, implementation):
        return attend(*(checkpoint_name(x, "qkv") for x in (q, k, v)), implementation)

    return {"attend": named}


def _unstacked():
    """Stacks whose leaves are lists of one array a block; see session.unstacked_state."""

    def loop(stack, body, carry, xs=None, *, without=(), prepare=lambda weights: weights, remat="none", unroll=1):
        from flax import nnx

        graphdef, unused, state = nnx.split(stack, lambda path, _: path[0] in without, ...)
        held, structure = jax.tree.flatten(state, is_leaf=lambda leaf: isinstance(leaf, list))
        for index in range(len(held[0])):
            block = structure.unflatten([leaf[index] for leaf in held])
            carry = body(nnx.merge(graphdef, unused, block), carry, jax.tree.map(lambda x, i=index: x[i], xs))
        return carry

    return {"scan_stack": loop}


def _fp8_per_tensor():
    """Products as cuBLASLt makes them in e4m3: codes [o, i], one scale a kernel, a constant one for the input."""

    def product(x, codes_oi, scale):
        step = jnp.asarray(0.02, x.dtype)
        rounded = (jnp.clip(x / step, -448, 448)).astype(jnp.float8_e4m3fn)
        kernel = codes_oi.astype(x.dtype) * scale.reshape(()).astype(x.dtype)
        return jax.lax.dot_general(rounded.astype(x.dtype) * step, kernel, (((x.ndim - 1,), (1,)), ((), ())))

    return {"product": product}


VARIANTS = {
    "rope": _rope_flipped,
    "split": _split_proj_out,
    "outputs": _named_outputs,
    "qkv": _named_qkv,
    "unstacked": _unstacked,
    "fp8-tensor": _fp8_per_tensor,
}
POLICIES = {
    "attention+": functools.partial(policy, ()),
    "outputs": functools.partial(policy, ("outputs",)),
    "outputs+qkv": functools.partial(policy, ("outputs", "qkv")),
}
