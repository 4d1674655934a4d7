"""The GPU script's own parts: steps by the dozen, the clock, blocks of pixels."""

import dataclasses
import functools
import importlib
import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.layers import Conv, Linear
from lorweb_jax.small_base.corpus import Corpus
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import TrainState


@pytest.fixture(scope="module")
def script():
    names = runpy.run_path(str(ROOT / "tools" / "gpu_base.py"))  # it puts tools/ on the path
    modules = map(importlib.import_module, ("gpu_latents", "gpu_prepare"))
    return functools.reduce(lambda all_, module: vars(module) | all_, modules, names)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.linear = Linear(3, 2, role="any", rngs=rngs)


CONFIG = dict(
    seed=0,
    train=dict(ema=0.9, accumulate=1),
    optimizer=dict(name="adamw", learning_rate=0.1, b1=0.9, b2=0.99, moments="float32", weight_decay=0.01, clip=1.0),
)


def loss(model, key, x):
    return (model.linear(x) ** 2).mean() + 0.01 * jax.random.normal(key), {"size": abs(x).mean()}


def test_a_dispatch_is_so_many_steps_of_the_optimizer(script):
    """Three steps at once against three by hand, at the rates of a cosine that ends with the time."""
    config = script["Settings"].of(CONFIG)
    made = script["trainer"](Model, config, loss)
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    begun = made.fresh()
    weights = average = begun.trainable
    moments = begun.optimizer["train"]
    after, metrics = made.lower(jax.ShapeDtypeStruct(x.shape, x.dtype)).compile()(
        begun, np.int32(3), np.float32(0.5), np.float32(0.1), np.float32(1), x
    )
    assert int(after.step) == 3 and metrics["size"] == pytest.approx(abs(x).mean(), rel=1e-6)
    for i in range(3):
        rate = 0.1 * 0.5 * (1 + np.cos(np.pi * (0.5 + 0.1 * i)))
        gradient = jax.grad(lambda weights: loss(made.partition.model(weights, {}), jax.random.key(0), x)[0])(weights)
        updates, moments = make_optimizer(config, lambda _, rate=rate: rate).update(gradient, moments, weights)
        weights = jax.tree.map(lambda w, u: w + u, weights, updates)
        decay = min(0.9, (1 + i) / (10 + i))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    for name in weights:
        np.testing.assert_allclose(after.trainable[name], weights[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(after.average[name], average[name], rtol=1e-4, atol=1e-6)


@pytest.fixture()
def log(script, tmp_path, monkeypatch):
    """A log whose clock stands still but for what `log.pass_` adds."""
    log, clock = script["Log"](tmp_path, 100), [3.0]
    monkeypatch.setattr(log, "now", lambda: clock[0])
    log.pass_ = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    return log


def test_the_clock_ends_a_run(script, log):
    """The first dispatches are of one step; the others as long as is asked for, and the last ends before the time."""
    asked, tables = [], []

    def program(state, steps, first, a_step, scale, table):
        asked.append((int(steps), float(first), float(a_step)))
        tables.append(table)
        log.pass_(0.1 * steps + 5 * (not asked[1:]))  # the first dispatch loads the program
        return state + steps, {"loss": np.float32(1)}

    state = script["run_until"](
        53.0, log, "vae", 25, 0, ("first",), program, lambda state, progress: ("second",) if state == 9 else None
    )
    steps = [1, 1, *[7] * 63]
    assert [count for count, *_ in asked] == steps and state == sum(steps) and log.now() == pytest.approx(52.3)
    np.testing.assert_allclose([first for _, first, _ in asked][2:4], [0.106 - 0.002, 0.106 + 0.012], rtol=1e-4)
    np.testing.assert_allclose([a_step for *_, a_step in asked[2:]], 0.1 / 50, rtol=1e-4)
    assert tables[2:4] == ["first", "second"] and len(log.record["vae"]) == len(asked)


def test_what_is_too_slow_ends_at_once(script, log):
    """2.8 s a step, as an autoencoder once took: seen after two steps, not at the end."""

    def program(state, steps, first, a_step, scale):
        log.pass_(2.8 * steps)
        return state + steps, {"loss": np.float32(1)}

    with pytest.raises(script["TooSlow"], match="2.80 s a step fewer than 500"):
        script["run_until"](103.0, log, "vae", 25, 0, (), program, least=500)
    assert log.now() == pytest.approx(3 + 2 * 2.8)
    assert script["run_until"](103.0, log, "vae", 25, 0, (), program) == 33


def test_a_loss_that_is_lost_is_tried_again_more_slowly(script, log):
    scales = []

    def program(state, steps, first, a_step, scale):
        scales.append(float(scale))
        log.pass_(1.0)
        fails = scale > 0.3 and state > 20
        return state + 1, {"loss": np.float32("nan") if fails else np.float32(1)}

    state = script["run_until"](73.0, log, "vae", 5, 0, (), program)
    # States are kept after a tenth of the time each, here after 9 and 17 dispatches and, in the second try, 3 more.
    assert scales == [1.0] * 22 + [0.5] * 5 + [0.25] * 43 and state == 20 + 43
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        script["run_until"](200.0, log, "vae", 5, 0, (), lambda *_: (0, {"loss": np.float32("nan")}))


@pytest.mark.parametrize("held", [None, {"w": np.float32(2)}])
def test_a_poor_autoencoder_gives_way_to_the_prepared_one(script, log, held):
    """At 12 dB the weights that --prepare was given are used, where there are some that fit."""
    log.seconds = 100
    used, images = [], np.zeros((4, 2, 8, 8, 3), np.uint8)
    stage = script["Stages"](
        SimpleNamespace(out=log.file.parent), log, SimpleNamespace(table=4, vae_steps=5, encoded=4), "float32"
    )

    def program(state, steps, *rest):
        used.append(state.trainable)
        log.pass_(0.01 * steps)
        return dataclasses.replace(state, trainable={"w": state.trainable["w"] + 1}), {
            "loss": np.float32(1),
            "psnr": np.float32(12),
        }

    def encode(weights, scale, shift, images):
        used.append(weights)
        return np.random.default_rng(0).standard_normal((4, 1, 1, 16))

    begun = TrainState(np.uint32(0), {"w": np.float32(0)}, None, {}, {})
    made = SimpleNamespace(program=program, held=held, begun=SimpleNamespace(result=lambda: begun))
    pixels = SimpleNamespace(wait_for=lambda n: None, table=lambda size, seed: images, pieces=[(np.arange(4), images)])
    weights, _ = stage.train_autoencoder(made, SimpleNamespace(program=(encode, encode)), pixels, None)
    assert used[0] == (held or {"w": np.float32(0)}) and used[-1] is weights
    assert (weights["w"] == 2) if held else (weights["w"] > 50)
    assert any("12.0 dB" in text for _, text in log.record["events"]) == bool(held)


@pytest.mark.parametrize("size", [3, 4, 5, 50])
def test_blocks_hold_all_quadrants_in_their_order(script, size):
    lengths, operations = (2, 1, 3), 4
    count = sum(lengths) * operations
    pixels = np.arange(count, dtype=np.uint8).reshape(-1, operations, 1, 1, 1)
    kept = [(np.arange(n), pixels[start : start + n]) for n, start in zip(lengths, np.cumsum([0, *lengths]))]
    found = [script["blocks"](kept, block, size, operations) for block in range(-(-count // size))]
    assert {len(block) for block in found} == {size}
    np.testing.assert_array_equal(np.concatenate(found)[:count, 0, 0, 0], np.arange(count))


def test_fewer_variants_in_the_same_shapes(script):
    """What may be drawn of members and of lists is the same."""
    few = Corpus(
        np.arange(3),
        np.arange(2),
        np.arange(3),
        np.array([[5, 6], [7, 8]]),
        np.array([2, 1]),
        np.arange(6).reshape(3, 2),
        np.zeros(3, bool),
        np.zeros(4, bool),
        np.array([1, 3]),
        np.arange(3),
        np.arange(3),
    )
    many = Corpus(
        np.arange(6),
        np.arange(4),
        np.arange(3),
        np.zeros((2, 4), int),
        np.array([4, 2]),
        np.zeros((6, 2), int),
        np.zeros(6, bool),
        np.zeros(4, bool),
        np.array([1, 3]),
        np.arange(3),
        np.arange(3),
    )
    fitted = script["same_shapes"](few, many)
    assert [array.shape for array in fitted] == [array.shape for array in many]
    assert set(fitted.edited) == {0, 1, 2} and fitted.counts.tolist() == [2, 1]
    np.testing.assert_array_equal(fitted.members[:, :2], few.members)
    np.testing.assert_array_equal(fitted.twins[:3], few.twins)


@pytest.mark.parametrize("size, stride, padding", [(3, 1, None), (3, 2, ((0, 1), (0, 1))), (1, 1, None)])
def test_a_convolution_by_products(size, stride, padding):
    """Against the convolution, at the kernels and strides that an autoencoder has."""
    conv = Conv(5, 7, size, stride=stride, padding=padding, rngs=nnx.Rngs(0))
    conv.bias[...] = jax.random.normal(jax.random.key(2), (7,))
    x = jax.random.normal(jax.random.key(1), (2, 8, 6, 5))
    expected = conv(x)
    conv.by_products = True
    np.testing.assert_allclose(conv(x), expected, atol=2e-6)


def test_prepared_weights_are_taken_where_they_fit(script, tmp_path, monkeypatch):
    monkeypatch.setitem(script["prepared_weights"].__globals__, "PREPARED", tmp_path)
    partition = script["trainer"](Model, script["Settings"].of(CONFIG), loss).partition
    assert script["prepared_weights"]("editor", partition) is None
    given = {name: np.ones(variable.shape, np.float16) for name, (_, variable) in partition.trainable.items()}
    np.savez(tmp_path / "editor.npz", **given)
    taken = script["prepared_weights"]("editor", partition)
    assert set(taken) == set(given) and all(array.dtype == np.float32 for array in taken.values())
    np.savez(tmp_path / "editor.npz", **given | {next(iter(given)): np.ones(9)})
    assert script["prepared_weights"]("editor", partition) is None


def test_configs_as_they_are_changed(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    change = script["changed_configs"]
    configs = change(["base_transformer.data.style=0.2", "base_transformer.train.batch=8", "base_vae.seed=3"])
    assert configs["base_transformer"]["data"]["style"] == 0.2 and configs["base_transformer"]["train"]["batch"] == 8
    assert configs["base_vae"]["seed"] == 3
    for text, message in (
        ("style=0.2", "names none of base_vae, base_transformer"),
        ("base_transformer.data.stile=0.2", "stile"),
        ("base_transformer.train.batch=many", "'many' is no value"),
        ("base_transformer.data.style=nan", "'nan' is no value"),
        ("base_transformer.data.style=7", "data.style"),
    ):
        with pytest.raises(UserError, match=message):
            change([text])
