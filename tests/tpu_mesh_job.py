"""TPU attention and modulation on four devices, heads and examples or tokens split, against one: prints how far off.

The kernels are replaced by plain formulas here, as emulating them on several devices takes minutes: what is compared is
how arrays and gradients are split and added up around them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from compare import relative

from lorweb_jax.models.flux1.embeddings import rotate
from lorweb_jax.nn import attention, head_major, modulated_norm, sharding


def heads(parts):
    return jnp.concatenate([part.reshape(*part.shape[:2], -1, 128) for part in parts], 1)


def normed(parts, scales, rope, factor, eps):
    x = [heads([part]) for part in parts]
    x = [y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps) * scale for y, scale in zip(x, scales)]
    return factor * rotate(jnp.concatenate(x, 1), rope).transpose(0, 2, 1, 3)


def merge(x, lengths):
    x = x.transpose(0, 2, 1, 3)
    return tuple(jnp.split(x.reshape(*x.shape[:2], -1), np.cumsum(lengths)[:-1], axis=1))


def modulated(x, shift, scale, eps):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return normed * (1 + scale[:, None]) + shift[:, None], x


head_major.normed, head_major.merge = normed, merge
head_major.split = lambda parts: heads(parts).transpose(0, 2, 1, 3)
attention._splash = lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2), -1) @ v
modulated_norm._modulated = modulated


@jax.jit
def attend(q, k, v, q_scales, k_scales, rope, dy):
    y, transpose = jax.vjp(lambda *inputs: attention.attend_streams(*inputs, rope, 1e-6), q, k, v, q_scales, k_scales)
    return y, transpose(dy)


@jax.jit
def modulate(x, shift, scale, dy):
    y, transpose = jax.vjp(modulated_norm.modulated, x, shift, scale)
    return y, transpose((dy, dy))


random = np.random.default_rng(0)
tokens = [[random.normal(size=(2, length, 4 * 128)) for length in (128, 256)] for _ in range(4)]
scales = [[1 + 0.2 * random.normal(size=128) for _ in range(2)] for _ in range(2)]
angles = random.uniform(0, 6, (384, 64))
streams = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.float32),
    tuple(map(tuple, [*tokens[:3], *scales, (np.cos(angles), np.sin(angles)), tokens[3]])),
)
branch = [
    jnp.asarray(random.normal(size=size), jnp.float32) for size in ((2, 256, 512), (2, 512), (2, 512), (2, 256, 512))
]

one = attend(*streams), modulate(*branch)
P = jax.sharding.PartitionSpec
splits = {
    "fsdp": (P("fsdp", None, "tensor"), P("fsdp")),
    "sequence": (P(None, None, ("tensor", "sequence")), P(None, "sequence")),
}
for axis, (attended, modulated) in splits.items():
    with jax.set_mesh(sharding.make_mesh({axis: 2, "tensor": 2})):
        many = attend(*streams), modulate(*branch)
    assert many[0][0][0].sharding.spec == attended and many[1][0][0].sharding.spec == modulated
    for ours, alone in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        print(relative(np.asarray(ours), np.asarray(alone)))
