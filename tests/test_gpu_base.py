"""The GPU script's own parts: steps by the dozen, the clock, blocks of pixels."""

import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

from conftest import ROOT
from lorweb_jax.layers import Linear, Weight
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.small_base.corpus import Corpus


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "tools" / "gpu_base.py"))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = Linear(3, 2, rngs=rngs)


CONFIG = dict(seed=0, train=dict(ema=0.9), optimizer=dict(
    name="adamw", learning_rate=0.1, b1=0.9, b2=0.99, moments="float32", weight_decay=0.01, clip=1.0))


def loss(model, key, x):
    return (model.linear(x) ** 2).mean() + 0.01 * jax.random.normal(key), {"size": abs(x).mean()}


def test_a_dispatch_is_so_many_steps_of_the_optimizer(script):
    """Three steps at once against three by hand, at the rates of a cosine that ends with the time."""
    config = script["Settings"].of(CONFIG)
    made = script["trainer"](SimpleNamespace(trainable=Weight, build=Model), config, 3, loss)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    state = made.fresh()
    weights, moments = state[0], state[1]
    (found, moments_found, count), metrics = made.lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()(
        state, np.float32(0.5), np.float32(0.1), np.float32(1), x)
    assert int(count) == 3 and metrics["size"] == pytest.approx(abs(x).mean(), rel=1e-6)
    for i in range(3):
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * (0.5 + 0.1 * i)))
        gradient = jax.grad(lambda weights: loss(made.layout.model(weights, {}), jax.random.key(0), x)[0])(weights)
        updates, moments = make_optimizer(config, lambda _: rate).update(gradient, moments, weights)
        weights = jax.tree.map(lambda w, u: w + u, weights, updates)
    for name in weights:
        np.testing.assert_allclose(found[name], weights[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(made.averaged(moments_found)[name], made.averaged(moments)[name], rtol=1e-4, atol=1e-6)


@pytest.fixture()
def log(script, tmp_path, monkeypatch):
    """A log whose clock stands still but for what `log.pass_` adds."""
    log, clock = script["Log"](tmp_path, 100), [3.0]
    monkeypatch.setattr(log, "now", lambda: clock[0])
    log.pass_ = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    return log


def test_the_clock_ends_a_run(script, log):
    asked, tables = [], []

    def program(state, first, a_step, scale, table):
        asked.append((float(first), float(a_step)))
        tables.append(table)
        log.pass_(5.0 if not asked[1:] else 2.0)       # the first dispatch takes longer
        return state + 1, {"loss": np.float32(1)}

    state = script["run_until"](53.0, log, "vae", 5, 0, ("first",), program,
                                lambda state, progress: ("second",) if state == 10 else None)
    assert state == len(asked) == 1 + 22 and log.now() == 3 + 5 + 22 * 2
    np.testing.assert_allclose([first for first, _ in asked], [0, *(0.1 + 0.04 * np.arange(22))], rtol=1e-5)
    np.testing.assert_allclose([a_step for _, a_step in asked[2:]], 0.04 / 5, rtol=1e-5)
    assert tables[9:11] == ["first", "second"] and len(log.record["vae"]) == state


def test_a_loss_that_is_lost_is_tried_again_more_slowly(script, log):
    scales = []

    def program(state, first, a_step, scale):
        scales.append(float(scale))
        log.pass_(1.0)
        fails = scale > 0.3 and state > 20
        return state + 1, {"loss": np.float32("nan") if fails else np.float32(1)}

    state = script["run_until"](73.0, log, "vae", 5, 0, (), program)
    # States are kept after a tenth of the time each, here after 9 and 17 dispatches and, in the second try, 3 more.
    assert scales == [1.0] * 22 + [0.5] * 5 + [0.25] * 43 and state == 20 + 43
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        script["run_until"](200.0, log, "vae", 5, 0, (), lambda *_: (0, {"loss": np.float32("nan")}))


@pytest.mark.parametrize("size", [3, 4, 5, 50])
def test_blocks_hold_all_quadrants_in_their_order(script, size):
    lengths, operations = (2, 1, 3), 4
    count = sum(lengths) * operations
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, operations, 1, 1, 1)
    kept = [(np.arange(n), pixels[start:start + n]) for n, start in zip(lengths, np.cumsum([0, *lengths]))]
    found = [script["blocks"](kept, block, size, operations) for _, block in script["block_starts"](kept, size, operations)]
    assert {len(block) for block in found} == {size}
    np.testing.assert_array_equal(np.concatenate(found)[:count, 0, 0, 0], np.arange(count))


def test_fewer_variants_in_the_same_shapes(script):
    """What may be drawn of members and of lists is the same."""
    few = Corpus(np.arange(3), np.arange(2), np.arange(3), np.array([[5, 6], [7, 8]]), np.array([2, 1]),
                 np.arange(6).reshape(3, 2), np.zeros(3, bool), np.zeros(4, bool), np.arange(3), np.arange(3))
    many = Corpus(np.arange(6), np.arange(4), np.arange(3), np.zeros((2, 4), int), np.array([4, 2]),
                  np.zeros((6, 2), int), np.zeros(6, bool), np.zeros(4, bool), np.arange(3), np.arange(3))
    fitted = script["same_shapes"](few, many)
    assert [array.shape for array in fitted] == [array.shape for array in many]
    assert set(fitted.edited) == {0, 1, 2} and fitted.counts.tolist() == [2, 1]
    np.testing.assert_array_equal(fitted.members[:, :2], few.members)
    np.testing.assert_array_equal(fitted.twins[:3], few.twins)
