"""CLIP text and vision, and its image processor, against transformers (torch, float32) and the golden data."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden import golden_dir
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.state import flat_state
from lorweb_jax.models.clip import folder as clip
from lorweb_jax.models.image_encoder.encoder import load_image_encoder
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.nn.layers import Weight

TOLERANCE = 1e-5
PIPELINE = golden_dir() / "tiny_pipeline"


def relative(ours, theirs) -> float:
    """Largest absolute error over the largest absolute value."""
    theirs = np.asarray(theirs)
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def test_pooled_text_equals_golden():
    with np.load(golden_dir() / "e2e_square.npz") as golden:
        ids, expected = golden["clip_input_ids"][None], golden["pooled_prompt_embeds"]
    model = clip.load_clip_text(PIPELINE / "text_encoder")
    run = jax.jit(lambda model, ids: model(ids))
    assert relative(run(model, ids), expected) <= TOLERANCE
    end = int(ids[0].argmax()) + 1
    # Causal, pooled at the end token: padding may be left off.
    assert relative(run(model, ids[:, :end]), expected) <= TOLERANCE


def test_pixel_values_and_embeddings_equal_golden():
    encoder = load_image_encoder(PIPELINE / "clip_vision")
    with np.load(golden_dir() / "external_query.npz") as golden:
        image, expected = golden["sq/image"], golden["sq/pil/cat-aa'b"][0]
        pixels = np.concatenate([golden[f"sq/pixel_values_{name}"] for name in ("a", "atag", "b")])
    crops = [image[:48, :48], image[:48, 48:], image[48:, :48]]
    assert np.abs(encoder.processor(crops).transpose(0, 3, 1, 2) - pixels).max() <= 1e-6
    assert relative(encoder.embed(crops), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 31, "width": 28}},  # smaller than the crop
        {"size": {"height": 20, "width": 36}, "do_center_crop": False},
    ],
)
def test_processor_equals_transformers(tmp_path, settings):
    pytest.importorskip("torch")
    from transformers import CLIPImageProcessor

    theirs = CLIPImageProcessor(**settings)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_folder(tmp_path)
    for shape in [(32, 32), (33, 77), (91, 40), (24, 25)]:
        image = np.random.default_rng(shape).integers(0, 256, (*shape, 3), np.uint8)
        expected = theirs(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(np.asarray(ours([image])[0]) - expected).max() <= 1e-6
    assert ImageProcessor.from_json(ours.to_json()) == ours


def test_images_of_the_encoders_size_need_no_host_work():
    processor = ImageProcessor.from_folder(PIPELINE / "clip_vision")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(processor.resized(images[0]), images[0])
    assert relative(jax.jit(processor.normalised)(images), processor(list(images))) <= 1e-6


def test_whole_sharded_model(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=9)
    theirs = CLIPModel(
        CLIPConfig(
            text_config=small | dict(vocab_size=60, max_position_embeddings=20, eos_token_id=59, hidden_act="gelu"),
            vision_config=small | dict(image_size=24, patch_size=8),
            projection_dim=20,
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    text, vision = clip.load_clip_text(tmp_path), clip.load_clip_vision(tmp_path)
    random = np.random.default_rng(0)
    ids, pixels = random.integers(0, 59, (2, 12)), random.normal(size=(2, 24, 24, 3)).astype(np.float32)
    ids[:, 7] = 59
    with torch.no_grad():
        pooled = theirs.text_model(torch.tensor(ids)).pooler_output
        images = torch.tensor(pixels.transpose(0, 3, 1, 2))
        embedding = theirs.get_image_features(images)
        states = theirs.vision_model(images, output_hidden_states=True).hidden_states
    assert relative(text(ids), pooled) <= TOLERANCE
    assert relative(vision(pixels), embedding) <= TOLERANCE
    assert vision.embedding_width == 20 and vision.patch_width == 32
    for ours, reference in zip(vision.hidden_states(pixels), states, strict=True):
        assert relative(ours, reference) <= TOLERANCE


def test_parameters_are_weights_and_train():
    config = clip.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=6,
    )
    graphdef, state = nnx.split(clip.ClipVision(config, rngs=nnx.Rngs(0)))
    assert all(isinstance(variable, Weight) for _, variable in nnx.to_flat_state(state))
    pixels = np.random.default_rng(0).normal(size=(1, 16, 16, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda state: jnp.square(nnx.merge(graphdef, state)(pixels)).sum()))(state)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # A key's bias shifts all of a query's scores alike: it alone has no gradient.
    assert all(
        np.abs(value).max() > 1e-6
        for path, value in flat_state(nnx.merge(graphdef, gradient)).items()
        if "k_proj.bias" not in path
    )


def test_what_it_writes_in_float16_transformers_reads(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPTextModel, CLIPVisionModelWithProjection

    small = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    random = np.random.default_rng(0)
    ids, pixels = random.integers(0, 30, (2, 9)), random.normal(size=(2, 16, 16, 3)).astype(np.float32)
    text = clip.ClipText(clip.CLIPTextConfig(**small, vocab_size=30, eos_token_id=29), rngs=nnx.Rngs(0))
    vision = clip.ClipVision(clip.CLIPVisionConfig(**small, image_size=16, patch_size=8), rngs=nnx.Rngs(0))
    for name, model in (("text", text), ("vision", vision)):
        clip.save_clip(model, tmp_path / name, np.float16)
    with torch.no_grad():
        pooled = CLIPTextModel.from_pretrained(tmp_path / "text")(torch.tensor(ids)).pooler_output
        embedding = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "vision")(
            torch.tensor(pixels.transpose(0, 3, 1, 2))
        ).image_embeds
    assert relative(clip.load_clip_text(tmp_path / "text")(ids), pooled) <= TOLERANCE
    assert relative(clip.load_clip_vision(tmp_path / "vision")(pixels), embedding) <= TOLERANCE


def test_errors(tmp_path):
    with pytest.raises(UserError, match="config.json"):
        load_image_encoder(tmp_path)
    shutil.copytree(PIPELINE / "clip_vision", tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="preprocessor_config.json"):
        load_image_encoder(tmp_path)
    with pytest.raises(UserError, match="clip_text_model"):
        clip.text_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 17}))
    with pytest.raises(UserError, match="does not fit"):
        clip.load_clip_vision(tmp_path)
