"""The training job of the small CLIP pair: its data, its captions, and that a few steps teach it something."""

import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS
from lorweb_jax.data.embedded.operations import OPERATIONS, STYLES, on_white
from lorweb_jax.models.tokenizers.folder import tokenize_clip
from lorweb_jax.small_base.jobs import clip as base_clip
from lorweb_jax.small_base.jobs import clip_quality
from lorweb_jax.small_base.tokenizers import CLIP_TOKENS, train_small_tokenizers

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config(drawing_pack):
    config = runpy.run_path(str(ROOT / "configs" / "base_clip.py"))["get_config"]("smoke")
    config.vision.update(hidden_size=40, intermediate_size=64, patch_size=16)
    config.text.update(hidden_size=32, intermediate_size=64)
    config.data.drawings = str(drawing_pack)
    return config


@pytest.fixture(scope="module")
def job(config):
    return base_clip.make(config)


def test_batches_show_training_drawings_and_go_on_from_their_position(config, job):
    data = job.data(config)
    assert job.drawings.held_out.any()
    shown = np.concatenate([next(data)["drawing"] for _ in range(10)])
    assert not job.drawings.held_out[shown].any() and len(set(shown)) > 20
    position, batch = data.get_state(), next(data)
    again = job.data(config)
    again.set_state(position)
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, batch[name])
        assert len(value) == config.train.batch


def test_images_show_the_chosen_edits(config, job):
    data, drawings, styled = job.data(config), job.drawings, 0
    for _ in range(10):
        batch = next(data)
        for images, drawing, edits in zip(batch["images"], batch["drawing"], batch["edits"]):
            np.testing.assert_array_equal(images[0], on_white(drawings.images[drawing]))
            for image, edit in zip(images[1:], edits):
                if edit < len(OPERATIONS):
                    operation = list(OPERATIONS.values())[edit]
                    np.testing.assert_array_equal(image, operation.apply(drawings.images[drawing]))
                    assert not (operation.needs_shape and drawings.set_of[drawing] == PHOTOGRAPH)
                else:
                    goal = SETS.index(list(STYLES)[edit - len(OPERATIONS)])
                    twin = drawings.twins[drawing, goal]
                    assert goal != drawings.set_of[drawing] and drawings.codes[twin] == drawings.codes[drawing]
                    np.testing.assert_array_equal(image, on_white(drawings.images[twin]))
                    styled += 1
    assert styled > 3


def test_joined_captions_are_the_tokenizers_own(tmp_path):
    firsts, seconds = ["red apple", "man firefighter"], ["in gray", "with a red frame"]
    words, _ = train_small_tokenizers(firsts, seconds, tmp_path, t5_tokens=CLIP_TOKENS)

    def ids(texts):
        return tokenize_clip(texts, tmp_path / "tokenizer")

    parts = [base_clip.trimmed(ids(texts), words - 1) for texts in (firsts, seconds)]
    joined = np.asarray(base_clip.joined(*parts, words - 1))
    expected = ids([f"{first} {second}" for first, second in zip(firsts, seconds)])
    np.testing.assert_array_equal(joined, expected[:, : joined.shape[1]])
    assert (expected[:, joined.shape[1] :] == words - 1).all()


@pytest.mark.usefixtures("quick_compiles")
def test_the_loss_of_one_batch_falls(config, job):
    batch, key = next(job.data(config)), jax.random.key(0)
    graphdef, state = nnx.split(job.build(nnx.Rngs(0)))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(state, moments):
        (loss, metrics), gradient = jax.value_and_grad(
            lambda state: job.loss(nnx.merge(graphdef, state), batch, key), has_aux=True
        )(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, loss, metrics

    losses, moments = [], optimizer.init(state)
    for _ in range(25):
        state, moments, loss, metrics = step(state, moments)
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert {"caption", "edit", "family", "kind"} < set(metrics)


def test_quality_of_an_embedding_that_tells_all():
    """Embeddings that move in a direction of its own for each operation: everything is told; noise tells nothing."""
    random = np.random.default_rng(0)
    operations = len(OPERATIONS)
    plain = random.normal(size=(6, 1, 2 * operations))
    moves = np.eye(operations, 2 * operations)[None] * random.uniform(1, 2, (6, operations, 1))
    x = np.concatenate([plain, plain + moves], 1)
    prototypes = clip_quality.unit(clip_quality.directions(x[:3]).mean(0))
    everything = np.ones(operations, bool)
    assert (clip_quality.nearest_operations(x[3:], prototypes, everything) == np.arange(operations)).all()
    assert clip_quality.probe(clip_quality.directions(x[:3]), clip_quality.directions(x[3:])).all()
    noise = random.normal(size=x.shape)
    assert (clip_quality.nearest_operations(noise, prototypes, everything) == np.arange(operations)).mean() < 0.1
