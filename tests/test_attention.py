"""Attention's implementations and rope's two forms against each other; GPU and TPU kernels emulated or skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from jax.experimental.pallas import tpu as pltpu

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.embeddings import _rotate_lanes, _rotate_pairs, rotary
from lorweb_jax.nn.attention import attend, candidates, choose, fastest, resolve


def softmax_attention(q, k, v):
    """The formula in float64, [b, s, h, a]."""
    scores = np.einsum("bshx,bthx->bhst", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhst,bthx->bshx", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("tokens", [128, 200])  # a whole block of the kernel, and one that has to be padded
def test_the_tpu_kernel_is_the_formula(tokens):
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, tokens, 2, 128))
    expected = softmax_attention(q, k, v)
    inputs = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    with pltpu.force_tpu_interpret_mode():
        assert relative(attend(*inputs, "pallas"), expected) <= 1e-5
    assert relative(attend(*inputs, "xla"), expected) <= 1e-5


def test_rope_in_lanes_equals_rope_in_pairs():
    x = jax.random.normal(jax.random.key(0), (2, 6, 3, 20))
    rope = rotary(jnp.arange(18).reshape(6, 3), (4, 6, 10))
    assert relative(_rotate_lanes(x, *rope), _rotate_pairs(x, *rope)) <= 1e-6


def test_auto_takes_what_runs_there():
    assert (
        resolve("auto", "tpu", jnp.bfloat16, 128) == "pallas" and resolve("auto", "gpu", jnp.bfloat16, 128) == "cudnn"
    )
    assert candidates("gpu", jnp.float32, 128) == candidates("tpu", jnp.bfloat16, 64) == ("xla",)
    assert choose("auto", (1, 16, 2, 8), jnp.float32, backward=True) == "xla"
    assert list(fastest((1, 16, 2, 8), jnp.float32, backward=True)) == ["xla"]
    with pytest.raises(UserError, match="'cudnn' does not run on this cpu in float32"):
        choose("cudnn", (1, 16, 2, 8), jnp.float32, backward=False)
    with pytest.raises(UserError, match="must be one of auto, xla, cudnn, pallas"):
        resolve("flash", "cpu", jnp.float32, 128)
