"""Attention's implementations and rope's forms against their formulas; GPU and TPU kernels emulated or skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from jax.experimental.pallas import tpu as pltpu

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.embeddings import _rotate_lanes, _rotate_pairs, _rotate_swapped, rotary, rotate
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


@pytest.mark.parametrize("form", [_rotate_pairs, _rotate_swapped, _rotate_lanes])
def test_rope_is_a_product_with_complex_numbers_in_every_form(form):
    """Pairs as complex numbers in float64, times e^iφ; the transpose, which `rotate` writes itself, times e^−iφ."""
    x, dy = np.random.default_rng(0).normal(size=(2, 2, 6, 3, 20)).astype(np.float32)
    cos, sin = rope = rotary(jnp.arange(18).reshape(6, 3), (4, 6, 10))
    turn = (np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64))[None, :, None]

    def turned(x, turn):
        return (x.astype(np.float64).view(np.complex128) * turn).view(np.float64)

    assert relative(form(jnp.asarray(x), *rope), turned(x, turn)) <= 1e-6
    y, transpose = jax.vjp(rotate, jnp.asarray(x), rope)
    assert relative(y, turned(x, turn)) <= 1e-6
    assert relative(transpose(jnp.asarray(dy))[0], turned(dy, turn.conj())) <= 1e-6
    assert relative(jax.vjp(form, jnp.asarray(x), *rope)[1](jnp.asarray(dy))[0], turned(dy, turn.conj())) <= 1e-6


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
