"""Attention's implementations and rope's forms against their formulas; GPU and TPU kernels emulated or skipped."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention

from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.blocks import attention
from lorweb_jax.models.flux1.embeddings import _rotate_lanes, _rotate_pairs, _rotate_swapped, rotary, rotate
from lorweb_jax.nn import attention as attention_module
from lorweb_jax.nn import head_major
from lorweb_jax.nn.attention import attend, candidates, choose, fastest, resolve
from lorweb_jax.nn.layers import RMSNorm


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


def normed_and_turned(parts, scales, angles, factor):
    """factor · e^iφ · RMSNorm(x) by heads: parts [b, s_p, h·128], scales [128], angles [s, 64] -> [b, h, s, 128]."""
    x = [part.reshape(*part.shape[:2], -1, 64, 2) for part in parts]
    x = [
        y / jnp.sqrt(jnp.square(y).mean((-2, -1), keepdims=True) + 1e-6) * scale.reshape(64, 2)
        for y, scale in zip(x, scales)
    ]
    x = jnp.concatenate(x, 1)
    x = (x[..., 0] + 1j * x[..., 1]) * jnp.exp(1j * angles)[:, None]
    return factor * jnp.stack([x.real, x.imag], -1).reshape(*x.shape[:3], 128).transpose(0, 2, 1, 3)


LENGTHS = [(256,), (128, 256)]  # one part; two, in blocks of 128 tokens


@pytest.mark.parametrize("lengths", LENGTHS)
def test_heads_normed_and_turned_by_a_kernel_are_the_formula(lengths, monkeypatch):
    """Values and gradients, against the formula in float64."""
    monkeypatch.setattr(head_major, "_GROUP", 3)  # of four heads: two groups of two
    random = np.random.default_rng(0)
    parts = tuple(random.normal(size=(2, length, 4 * 128)) for length in lengths)
    scales = tuple(1 + 0.2 * random.normal(size=128) for _ in lengths)
    angles, dy = random.uniform(0, 6, (sum(lengths), 64)), random.normal(size=(2, 4, sum(lengths), 128))
    with jax.enable_x64(True):
        formula = jax.vjp(lambda *xs: normed_and_turned(*xs, angles, 0.3), parts, scales)
        expected = jax.tree.map(np.asarray, (formula[0], formula[1](jnp.asarray(dy))))
    rope = tuple(jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin))
    parts, scales, dy = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (parts, scales, dy))
    with pltpu.force_tpu_interpret_mode():
        y, transpose = jax.vjp(lambda *xs: head_major.normed(*xs, rope, 0.3), parts, scales)
        found = y, transpose(dy)
    for ours, formulas in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(ours, formulas) <= 1e-6


@pytest.mark.parametrize("lengths", LENGTHS)
def test_split_and_merge_move_heads_and_undo_each_other(lengths):
    random = np.random.default_rng(0)
    parts = tuple(jnp.asarray(random.normal(size=(2, length, 3 * 128)), jnp.bfloat16) for length in lengths)
    joined = jnp.concatenate(parts, 1)
    expected = joined.reshape(2, -1, 3, 128).transpose(0, 2, 1, 3)
    with pltpu.force_tpu_interpret_mode():
        y, back = jax.vjp(head_major.split, parts)
        again, forth = jax.vjp(lambda x: head_major.merge(x, lengths), expected)
        pairs = [(y, expected), (forth(parts)[0], expected), *zip(back(expected)[0], parts), *zip(again, parts)]
    for found, wanted in pairs:
        np.testing.assert_array_equal(found.astype(np.float32), wanted.astype(np.float32))


def test_the_tpu_kernel_takes_several_examples(monkeypatch):
    """Values and gradients; by Pallas's general interpreter, as the TPU's knows no batches of this kernel."""
    monkeypatch.setattr(splash_attention, "make_splash_mha", partial(splash_attention.make_splash_mha, interpret=True))
    *streams, dy = np.random.default_rng(0).normal(size=(4, 2, 2, 384, 128)).astype(np.float32)
    streams[0] /= 10

    def run(attend):
        y, transpose = jax.vjp(attend, *streams)
        return y, *transpose(dy)

    formula = run(lambda q, k, v: jax.nn.softmax(q @ k.swapaxes(-1, -2), -1) @ v)
    for ours, wanted in zip(run(attention_module._splash), formula, strict=True):
        assert relative(ours, wanted) <= 1e-5


@pytest.mark.parametrize("keys", [128, 384])  # blocks of keys: three, whose gradients of q are added up, and one
def test_parts_through_tpu_kernels_equal_xla(keys, monkeypatch):
    """From projections to the output projection's inputs, and back, in float32."""
    monkeypatch.setattr("lorweb_jax.nn.attention._HELD", keys * 128 * 4)
    random = np.random.default_rng(0)
    norms = [RMSNorm(128, rngs=nnx.Rngs(0)) for _ in range(4)]
    for norm in norms:
        norm.scale[...] = jnp.asarray(1 + 0.2 * random.normal(size=128), jnp.float32)
    rope = rotary(jnp.asarray(random.integers(0, 99, (384, 3))), (16, 56, 56))
    streams = [tuple(random.normal(size=(3, 1, length, 256)).astype(np.float32)) for length in (128, 256)]
    q, k, v = zip(*streams)
    dy = tuple(random.normal(size=(1, length, 256)).astype(np.float32) for length in (128, 256))

    def run(implementation):
        y, transpose = jax.vjp(lambda q, k, v: attention(q, k, v, norms[:2], norms[2:], rope, implementation), q, k, v)
        return y, transpose(dy)

    with pltpu.force_tpu_interpret_mode():
        found = run("pallas")
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(run("xla")), strict=True):
        assert relative(ours, wanted) <= 1e-5


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
