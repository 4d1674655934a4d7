"""A basis with other coefficients than its router's: wrong pairs, the mean, and adaptation against Adam in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorweb_jax.adapters.basis import Basis, BasisConfig, LayerShape
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation import probes
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.evaluation.words import parse_method
from lorweb_jax.flow.loss import draw
from lorweb_jax.flow.schedule import train_timesteps, train_weights
from lorweb_jax.pipeline.pipeline import Pipeline

PATH = "layer"


class LinearModel(nnx.Module):
    """A velocity that is the coefficients' mean over layers times fixed directions [n, c], and the references' mean."""

    def __init__(self, basis, directions):
        self.basis, self.directions = basis, nnx.Variable(directions)

    def only(self, *parts):
        return self

    def tokens(self, images):
        return images[:, ::2, 0].astype(jnp.float32) / 255

    def velocity(self, tokens, references, text, pooled, time, guidance, size, adapters):
        c = adapters[PATH].coeff_bn.mean(0)
        return jnp.broadcast_to((c @ self.directions[...] + references.mean((1, 2))[:, None])[:, None], tokens.shape)


class LinearPipeline(Pipeline):
    """Over a LinearModel; what it sees of images is their means."""

    def prompt(self, texts):
        return None, None

    def _query(self, conditions):
        means = [[image.mean() / 255 for image in images] for images in conditions]
        return jnp.asarray([[*row, 1, row[0] * row[1]] for row in means], jnp.float32) * 3


@pytest.fixture
def pipeline():
    random = np.random.default_rng(0)
    config = BasisConfig(size=4, rank=1, key_dim=6, query_dim=5, scale=2.0)
    basis = Basis(config, {PATH: LayerShape(2, 3, 3)}, rngs=nnx.Rngs(0))
    return LinearPipeline(None, LinearModel(basis, jnp.asarray(random.normal(size=(4, 3)), jnp.float32)))


@pytest.fixture
def samples():
    random = np.random.default_rng(1)

    def sample(split, task, number):
        images = random.integers(0, 256, (4, 8, 8, 3), np.uint8)
        return Sample(task, "do it", *images, split=split, key=f"{split} {task} {number}")

    return [sample(split, task, i) for split in ("x", "y") for task in ("one", "two", "three") for i in range(2)]


def test_a_wrong_pair_is_of_another_task_of_the_split(pipeline, samples):
    """It depends on the sample alone, and the router sees it with the sample's own b."""
    partners = probes.wrong_pairs(samples)
    for sample in samples:
        other = partners[sample.id]
        assert other.task != sample.task and other.split == sample.split
    mixes = probes.chooser("wrong", pipeline, samples)(samples[2:4])
    for sample, mix in zip(samples[2:4], mixes):
        other = partners[sample.id]
        expected = pipeline.model.basis.coefficients(pipeline.query([(other.a, other.a2, sample.b)]))[PATH][:, 0]
        np.testing.assert_allclose(mix.coefficients[PATH], expected, atol=1e-6)
    with pytest.raises(UserError, match="there is one task"):
        probes.wrong_pairs(samples[:2])


def test_the_mean_is_that_of_all_samples(pipeline, samples):
    [mix] = probes.chooser("mean", pipeline, samples)(samples[:5])
    everything = np.asarray(probes.route(pipeline, samples)[PATH], np.float64)
    np.testing.assert_allclose(mix.coefficients[PATH], everything.mean(1), atol=1e-6)


def test_several_pairs_are_those_of_the_task(pipeline, samples):
    """Every pair of the task with the sample's own b, but none that shows the answer."""
    leak = Sample("one", "do it", samples[0].b, samples[0].b2, samples[1].a, samples[1].a2, split="x", key="x leak")
    samples = [*samples, leak]
    mixes = probes.chooser("pairs", pipeline, samples)([samples[0], samples[3]])
    for mix, sample, pairs in zip(mixes, (samples[0], samples[3]), (samples[:2], samples[2:4])):
        each = pipeline.model.basis.coefficients(pipeline.query([(pair.a, pair.a2, sample.b) for pair in pairs]))[PATH]
        np.testing.assert_allclose(mix.coefficients[PATH], np.asarray(each, np.float64).mean(1), atol=1e-6)
    with pytest.raises(UserError, match="each has one; give a larger --per-task"):
        probes.further_pairs(samples[:1])


def test_adaptation_is_adam_on_each_samples_own_loss(pipeline, samples):
    """Against gradients and Adam written out in float64, at the rate divided by the basis's scale; what else is in the
    batch makes no difference."""
    steps, rate, chosen = 3, 0.05, samples[:3]
    found = probes.adapted(pipeline, chosen, steps, rate)[PATH]
    directions = np.asarray(pipeline.model.directions[...], np.float64)
    start = np.asarray(probes.route(pipeline, chosen)[PATH], np.float64)
    for i, sample in enumerate(chosen):
        grid = np.concatenate([np.concatenate([sample.a, sample.a2], 1)] * 2)  # a, a′ over b = a, b′ = a′
        x0 = jnp.asarray(grid[::2, 0], jnp.float32)[None] / 255
        condition = np.concatenate([np.concatenate([sample.a, last], 1) for last in (sample.a2, sample.a)])
        offset = np.asarray(condition[::2, 0], np.float64).mean() / 255
        c, m, v = start[:, i], 0.0, 0.0
        for step in range(steps):
            key = jax.random.fold_in(jax.random.key(sample.noise_seed), step)
            noised = draw(key, x0, train_timesteps(), train_weights("bell"))
            target, weight = np.asarray(noised.target_bsc[0], np.float64), float(noised.weight_b[0])
            error = c.mean(0) @ directions + offset - target  # [s, c]
            gradient = weight * 2 * (error.mean(0) / 3) @ directions.T / 2  # the mean over 3 channels and 2 layers
            gradient = np.stack([gradient] * 2)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            c = c - rate / 2 * (m / (1 - 0.9 ** (step + 1))) / (np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8)
        np.testing.assert_allclose(found[:, i], c, atol=2e-5)
    alone = probes.adapted(pipeline, samples[1:2], steps, rate)[PATH]
    np.testing.assert_allclose(alone[:, 0], found[:, 1], atol=1e-6)
    assert np.abs(found - start).max() > rate / 2


def test_a_lora_s_strength_is_adapted_too(pipeline, samples):
    """Of one member, whose coefficient is 1 before; another for each sample."""
    config = BasisConfig(size=1, rank=1, query="fixed", query_dim=None)
    basis = Basis(config, {PATH: LayerShape(2, 3, 3)}, rngs=nnx.Rngs(0))
    lora = LinearPipeline(None, LinearModel(basis, pipeline.model.directions[...][:1]))
    mixes = probes.chooser("adapted", lora, samples)(samples[:3])
    moved = np.stack([mix.coefficients[PATH] for mix in mixes])  # [samples, l, n]
    assert moved.shape == (3, 2, 1) and (0.01 < np.abs(moved - 1)).all() and (np.abs(moved - 1) < 0.5).all()
    assert len(np.unique(moved.round(5))) == 3
    basis.config = BasisConfig(size=1, rank=1, query="internal", query_mode="aa'bb'", query_dim=None)
    with pytest.raises(UserError, match="known beforehand, and this basis has the query 'internal'"):
        probes.chooser("adapted", lora, samples)


def test_words(tmp_path, monkeypatch, pipeline, samples):
    named = parse_method("ours=wrong:runs/basis")
    assert (named.name, named.probe, named.path) == ("ours", "wrong", "runs/basis")
    assert parse_method("mean:a=b").path == "a=b" and parse_method("mean=runs/x").name == "mean"
    with pytest.raises(UserError, match="'adapted:' names no basis"):
        parse_method("adapted:")
    named = parse_method("less=strength:-0.5:runs/a:b")
    assert (named.name, named.probe, named.strength, named.path) == ("less", "strength", -0.5, "runs/a:b")
    for text, said in (("strength:lots:x", "begins with 'lots', which is no"), ("strength:1:", "names no basis")):
        with pytest.raises(UserError, match=said):
            parse_method(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mean:x").touch()
    assert parse_method("mean:x").probe == ""
    pipeline.model.basis.config = BasisConfig(size=4, query="fixed", query_dim=None)
    with pytest.raises(UserError, match="has the query 'fixed'"):
        probes.chooser("mean", pipeline, samples)
