"""The base's training may start from weights that an earlier one left."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded.drawing_sets import load_sets
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white
from lorweb_jax.files.state import build, flat_state, shapes
from lorweb_jax.main import read_config
from lorweb_jax.small_base.editor import Editor, editor_config
from lorweb_jax.small_base.jobs import transformer
from lorweb_jax.small_base.jobs.transformer import read_editor, write_editor


def sizes(single_blocks: int):
    config = read_config("configs/base_transformer.py")
    config.transformer.update(
        num_layers=1, num_single_layers=single_blocks, attention_head_dim=8, axes_dims_rope=(4, 2, 2)
    )
    return editor_config(config, 30, 40)


def editor(config):
    return Editor(config, 1, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def model():
    """Of two single blocks, with random weights."""
    random = np.random.default_rng(0)
    flat = shapes(lambda: editor(sizes(2)))
    return build(lambda: editor(sizes(2)), {name: random.normal(size=shape.shape) for name, shape in flat.items()})


def test_what_was_written_is_read(model, tmp_path):
    config = sizes(2)
    write_editor(tmp_path, config, model)
    read = read_editor(tmp_path, config, shapes(lambda: editor(config)))
    written = flat_state(model)
    assert read.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(
            np.asarray(read[name], np.float32), jnp.asarray(array, jnp.float16).astype(jnp.float32)
        )


def test_weights_of_other_sizes_are_refused(model, tmp_path):
    write_editor(tmp_path, sizes(2), model)
    with pytest.raises(UserError, match="don't fit the config .*single_transformer_blocks"):
        read_editor(tmp_path, sizes(3), shapes(lambda: editor(sizes(3))))


class Pooled(nnx.Module):
    """In the place of an autoencoder: latents are mean colours of 8 x 8 pixels, in the first three of 16 channels."""

    def latents(self, images):
        b, h, w, c = images.shape
        means = images.reshape(b, h // 8, 8, w // 8, 8, c).mean((2, 4))
        return jnp.pad(means, ((0, 0), (0, 0), (0, 0), (0, 13)))


def test_latents_of_the_drawings_that_are_wanted_are_computed_once(drawing_pack, tmp_path, monkeypatch):
    """Six drawings, then nine; a kill loses at most the rows at hand. The operations are on the pixels themselves."""
    drawings, encoded = load_sets(drawing_pack), []
    plainly = transformer.operated_chunk
    monkeypatch.setattr(
        transformer, "operated_chunk", lambda images, names: encoded.append(len(images)) or plainly(images, names)
    )
    data = SimpleNamespace(variants=1, size=drawings.images.shape[1], cache=str(tmp_path))

    def latents(count):
        wanted = np.arange(len(drawings)) < count
        return transformer.latents_of(Pooled(), {"w": np.ones(1)}, drawings, data, wanted)

    latents(6)
    assert sum(encoded) == 6
    quadrants, large = latents(9)
    assert sum(encoded) == 9 and len(quadrants) == len(large) == len(drawings)
    name = "frame_red"
    for row in (0, 5, 8):
        for column, image in (
            (0, on_white(drawings.images[row])),
            (1 + list(OPERATIONS).index(name), OPERATIONS[name].apply(drawings.images[row])),
        ):
            side = len(image) // 8
            means = (image.astype(np.float64) / 127.5 - 1).reshape(side, 8, side, 8, 3).mean((1, 3))
            np.testing.assert_allclose(quadrants[row, column, ..., :3], means, atol=1e-3)
    assert large[8, ..., :3].std() > 0 and not quadrants[9:].any() and not large[9:].any()
