"""What tools/gpu_session tries on a GPU, in place of the code's own: the same results."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx

from lorweb_jax.models.flux1 import blocks
from lorweb_jax.models.flux1.embeddings import rotary
from lorweb_jax.nn.layers import HIDDEN, REMAT_POLICIES, RMSNorm


@pytest.fixture(scope="module")
def applied():
    folder = str(Path(__file__).parents[1] / "tools/gpu_session")
    sys.path.insert(0, folder)
    yield importlib.import_module("variants").applied
    sys.path.remove(folder)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_norm_and_rope_in_one_pass(applied):
    """Triton's kernel, interpreted, of text and image, against XLA's norms and rope, and its gradient: 1e-6."""
    parts, norms = (numbers(0, 2, 4, 384), numbers(1, 2, 12, 384)), [RMSNorm(128, rngs=nnx.Rngs(0)) for _ in "ti"]
    for seed, norm in enumerate(norms):
        norm.scale.set_value(numbers(seed + 2, 128))
    rope = rotary(numbers(4, 16, 3), (16, 56, 56))

    def both():
        made, pullback = jax.vjp(lambda parts: blocks.normed_heads(parts, norms, rope), parts)
        return made, *pullback(numbers(5, *made.shape))[0]

    expected = both()
    with applied(["one pass"]):
        assert "pallas_call" in str(jax.make_jaxpr(lambda parts: blocks.normed_heads(parts, norms, rope))(parts))
        made = both()
    for one, other in zip(made, expected):
        assert one.shape == other.shape and relative(one, other) <= 1e-6


def test_gelu_of_a_kept_product(applied):
    """The same numbers, kept as before, but for the rounding to the type that it has, which kept gelu apart."""
    x, w, v = (numbers(seed, 8, 8).astype(jnp.bfloat16) for seed in range(3))

    def gradients():
        def loss(x, w):
            return (blocks.gelu(blocks.checkpoint_name(x @ w, HIDDEN)) @ v).astype(jnp.float32).sum()

        step = jax.grad(jax.checkpoint(loss, policy=REMAT_POLICIES["dots"]), argnums=(0, 1))
        jaxpr = str(jax.make_jaxpr(step)(x, w))
        return jax.jit(step)(x, w), jaxpr.count("reduce_precision"), jaxpr.count("dot_general")

    expected, rounded, products = gradients()
    with applied(["gelu in product"]):
        made, rounded_now, products_now = gradients()
    assert (rounded, rounded_now) == (1, 0) and products == products_now
    for one, other in zip(made, expected):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
