"""The training job of the small CLIP pair: its data, and that a few steps teach it something."""

import runpy
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from lorweb_jax.data.operations import OPERATIONS, on_white
from lorweb_jax.encoders.tokenizers import tokenize_clip
from lorweb_jax.training.jobs import base_clip

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def config():
    config = runpy.run_path(str(ROOT / "configs" / "base_clip.py"))["get_config"]("smoke")
    config.vision.update(hidden_size=32, intermediate_size=64)
    config.text.update(hidden_size=32, intermediate_size=64)
    config.data.cache = str(ROOT / config.data.cache)
    return config


@pytest.fixture(scope="module")
def job(config):
    return base_clip.make(config)


def test_batches_show_training_drawings_and_go_on_from_their_position(config, job):
    data = job.data(config)
    assert not data.drawings.held_out.any() and job.drawings.held_out.any()
    next(data)
    position, batch = data.get_state(), next(data)
    again = job.data(config)
    again.set_state(position)
    for name, value in next(again).items():
        np.testing.assert_array_equal(value, batch[name])
        assert len(value) == config.train.batch


def test_images_captions_and_operations_belong_together(config, job):
    batch = next(job.data(config))
    plain = np.stack([on_white(image) for image in job.train_drawings.images])
    for images, captions, operations in zip(batch["images"], batch["captions"], batch["operations"]):
        drawing = int((plain == images[0]).all((1, 2, 3)).argmax())
        np.testing.assert_array_equal(captions[0], job.captions[drawing, 0])
        for image, caption, operation in zip(images[1:], captions[1:], operations):
            effect = list(OPERATIONS.values())[operation].apply
            np.testing.assert_array_equal(image, effect(job.train_drawings.images[drawing]))
            np.testing.assert_array_equal(caption, job.captions[drawing, 1 + operation])


def test_joined_captions_are_the_tokenizers_own(job, tmp_path):
    job._tokenizers(tmp_path)
    texts = [job.train_drawings.names[5], f"{job.train_drawings.names[5]} {list(OPERATIONS.values())[9].describe}"]
    expected = tokenize_clip(texts, tmp_path / "tokenizer", job.captions.shape[-1])
    np.testing.assert_array_equal(job.captions[5, [0, 10]], expected)


def test_the_loss_of_one_batch_falls(config, job):
    batch, key = next(job.data(config)), jax.random.key(0)
    graphdef, state = nnx.split(job.build(nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(state, moments):
        loss, gradient = jax.value_and_grad(lambda state: job.loss(nnx.merge(graphdef, state), batch, key)[0])(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments, loss

    losses, moments = [], optimizer.init(state)
    for _ in range(8):
        state, moments, loss = step(state, moments)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
