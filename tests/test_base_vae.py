"""The small base's autoencoder job: what its batches show, and the weights it begins with."""

import runpy

import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from safetensors.numpy import load_file

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white
from lorweb_jax.files.state import shapes
from lorweb_jax.small_base.jobs.vae import BaseVAE

SHIPPED = ROOT / "assets" / "small_kontext" / "vae"


def config_on(drawing_pack, **model):
    config = runpy.run_path(str(ROOT / "configs" / "base_vae.py"))["get_config"]("smoke")
    config.data.drawings = str(drawing_pack)
    config.model.update(model)
    return config


def initial(config):
    """What training begins with in the place of random weights."""
    job = BaseVAE(config)
    return job.initial(shapes(lambda: job.build(nnx.Rngs(0))))


def test_training_goes_on_from_the_weights_of_a_folder(drawing_pack):
    config = config_on(drawing_pack)
    config.initial = str(SHIPPED)
    found = initial(config)
    for name, array in load_file(SHIPPED / "diffusion_pytorch_model.safetensors").items():
        path, _, leaf = name.rpartition(".")
        if array.ndim == 4:  # torch's [out, in, h, w]
            leaf, array = "kernel", array.transpose(2, 3, 1, 0)
        elif leaf == "weight":
            leaf = "scale"
        np.testing.assert_array_equal(found.pop(f"{path}.{leaf}"), array.astype(np.float32))
    assert not found
    assert BaseVAE(config).sources().keys() == {"initial"}


def test_without_a_folder_it_begins_with_random_weights(drawing_pack):
    config = config_on(drawing_pack)
    assert initial(config) == {} and BaseVAE(config).sources() == {}


def test_weights_of_another_shape_are_refused(drawing_pack):
    config = config_on(drawing_pack, block_out_channels=(16, 32, 64, 128))
    config.initial = str(SHIPPED)
    with pytest.raises(UserError, match="vae doesn't fit config.model"):
        initial(config)


def test_canvases_show_training_drawings_and_go_on_from_their_position(drawing_pack):
    job = BaseVAE(config_on(drawing_pack))
    quadrants = {
        effect(image).tobytes()
        for image, held_out in zip(job.drawings.images, job.drawings.held_out)
        if not held_out
        for effect in (on_white, *(o.apply for o in OPERATIONS.values()))
    }
    data = job.canvases(4, 0.3, seed=5)
    canvas = next(data)["canvas"]
    assert canvas.shape == (4, 128, 128, 3)
    for x in canvas:
        for quadrant in (x[:64, :64], x[:64, 64:], x[64:, :64], x[64:, 64:]):
            assert quadrant.tobytes() in quadrants
    again = job.canvases(4, 0.3, seed=5)
    again.set_state(data.get_state())
    np.testing.assert_array_equal(next(again)["canvas"], next(data)["canvas"])
