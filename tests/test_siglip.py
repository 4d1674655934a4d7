"""SigLIP's vision tower and image processor against transformers (torch, float32)."""

import dataclasses

import jax
import numpy as np
import pytest

from lorweb_jax.models.image_encoder.encoder import load_image_encoder
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.models.siglip.model import SiglipVision, load_siglip

TOLERANCE = 1e-5
VISION = dict(
    hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
)


def relative(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    theirs = theirs.detach().numpy()
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def shaken(torch, model):
    """The model with random weights everywhere, norms and biases included."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def test_equals_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import SiglipVisionConfig, SiglipVisionModel

    theirs = shaken(torch, SiglipVisionModel(SiglipVisionConfig(**VISION)))
    theirs.save_pretrained(tmp_path)
    ours = load_siglip(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected = theirs(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
    assert relative(jax.jit(lambda model, x: model(x))(ours, pixels), expected.pooler_output) <= TOLERANCE
    states = ours.hidden_states(pixels)
    assert len(states) == len(expected.hidden_states)
    for state, reference in zip(states, expected.hidden_states):
        assert relative(state, reference) <= TOLERANCE


def test_whole_sharded_model_with_its_processor(tmp_path):
    torch = pytest.importorskip("torch")
    from PIL import Image
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    theirs = shaken(torch, SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    encoder = load_image_encoder(tmp_path)
    assert isinstance(encoder.model, SiglipVision)
    images = [
        np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        for i, shape in enumerate([(50, 37, 3), (32, 32, 3), (20, 90, 3)])
    ]
    pixels = processor([Image.fromarray(image) for image in images], return_tensors="pt")
    assert relative(encoder.processor(images).transpose(0, 3, 1, 2), pixels["pixel_values"]) <= 1e-6
    assert relative(encoder.embed(images), theirs.get_image_features(**pixels)) <= TOLERANCE


def test_processor_config_round_trip():
    processor = ImageProcessor((0.5,) * 3, (0.5,) * 3, size=(224, 224))
    assert ImageProcessor.from_json(processor.to_json()) == processor
    cut = dataclasses.replace(processor, size=None, crop=(224, 224))  # do_resize: false
    assert ImageProcessor.from_json(cut.to_json()) == cut
