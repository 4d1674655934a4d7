"""Which image encoder a basis was trained with: its published name, and that another one is found out."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from golden import golden_dir

from lorweb_jax.adapters.formats.basis_file import read_basis, write_basis
from lorweb_jax.common.errors import UserError
from lorweb_jax.files import safetensors_io
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.models.image_encoder.identity import CLIP, SIGLIP, identity, is_sketch, published_name, same
from lorweb_jax.pipeline.adapters import basis_of_run, write_run
from lorweb_jax.pipeline.folder import PipelineFolder

PIPELINE = golden_dir() / "tiny_pipeline"
CLIP_L = dict(
    hidden_size=1024,
    intermediate_size=4096,
    projection_dim=768,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=14,
    model_type="clip_vision_model",
)
TINY = json.loads((PIPELINE / "clip_vision" / "config.json").read_text())
SIGLIP2 = dict(model_type="siglip", text_config={"vocab_size": 256000}, vision_config={"hidden_size": 768})


@pytest.mark.parametrize(
    "config,folder,name",
    [
        (CLIP_L, "anything", CLIP),
        (dict(model_type="clip", projection_dim=768, vision_config=CLIP_L | {"projection_dim": 512}), "anything", CLIP),
        (CLIP_L | {"hidden_act": "gelu"}, "laion", "other-clip"),
        (CLIP_L | {"image_size": 336}, "x", "other-clip"),
        (TINY, "clip_vision", "other-clip"),
        (TINY, "clip-vit-large-patch14", CLIP),
        (TINY, "clip-vit-large", "other-clip"),
        (TINY, "models--openai--clip-vit-large-patch14/snapshots/abc", CLIP),
        (TINY | {"_name_or_path": "openai/clip-vit-large-patch14"}, "x", CLIP),
        (SIGLIP2, "anything", SIGLIP),
        (dict(model_type="siglip_vision_model"), "anything", SIGLIP),
        (dict(SIGLIP2, text_config={}), "siglip-base", "other-siglip"),
        (dict(model_type="siglip_vision_model", _name_or_path="google/siglip-base-patch16-224"), "x", "other-siglip"),
        (dict(model_type="siglip_vision_model", hidden_size=1152), "so400m", "other-siglip"),
    ],
)
def test_published_name(config, folder, name, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(json.dumps(config))
    assert published_name(tmp_path / folder) == name


def encoder(folder: Path, change=lambda name, array: array) -> Path:
    """A copy of the tiny pipeline's image encoder with changed weights."""
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(PIPELINE / "clip_vision" / name, folder)
    weights = safetensors.numpy.load_file(PIPELINE / "clip_vision" / "model.safetensors")
    safetensors_io.write(
        folder / "model.safetensors", {name: change(name, array) for name, array in weights.items()}, {"format": "pt"}
    )
    return folder


def test_sketch(tmp_path):
    """The same weights in 16 bit, or with a text tower beside them, are the same; others are not."""
    own = identity(PIPELINE / "clip_vision").sketch
    assert is_sketch(own) and len(own) < 300
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = identity(
            encoder(tmp_path / np.dtype(dtype).name, lambda name, array, dtype=dtype: array.astype(dtype))
        ).sketch
        assert same(own, half) and half != own
    whole = encoder(tmp_path / "whole")
    weights = safetensors.numpy.load_file(whole / "model.safetensors")
    safetensors.numpy.save_file(
        weights | {"text_model.embeddings.token_embedding.weight": np.ones((3, 4), np.float32)},
        whole / "model.safetensors",
        {"format": "pt"},
    )
    assert identity(whole).sketch == own
    random = np.random.default_rng(0)
    other = encoder(tmp_path / "other", lambda name, array: random.permutation(array.reshape(-1)).reshape(array.shape))
    assert not same(own, identity(other).sketch)
    larger = encoder(tmp_path / "larger", lambda name, array: array * np.float32(1.1))
    assert not same(own, identity(larger).sketch)


@pytest.fixture
def basis():
    """The golden basis, as if it had been trained with the tiny pipeline's image encoder."""
    config, arrays = read_basis(golden_dir() / "basis_a.safetensors")
    found = identity(PIPELINE / "clip_vision")
    return dataclasses.replace(config, encoder=found.name, encoder_sketch=found.sketch), arrays


def test_another_encoder_is_found_out(basis, tmp_path):
    """A published file says which encoder it was trained with; a 16-bit copy will do, another of its size won't."""
    config, arrays = basis
    write_basis(tmp_path / "basis.safetensors", config, arrays)
    assert Checkpoint(tmp_path / "basis.safetensors").metadata.keys() == {"format", "lorweb_jax.image_encoder"}
    read = read_basis(tmp_path)[0]
    assert read == config
    PipelineFolder(PIPELINE).require_encoder(read)
    half = encoder(tmp_path / "half", lambda name, array: array.astype(np.float16))
    PipelineFolder(PIPELINE, half).require_encoder(read)
    other = PipelineFolder(PIPELINE, encoder(tmp_path / "other", lambda name, array: -array))
    with pytest.raises(UserError, match=f"trained with another image encoder than {tmp_path}/other holds: its weights"):
        other.require_encoder(read)
    other.require_encoder(dataclasses.replace(read, encoder_sketch=""))
    header = {"format": "pt", "lorweb_jax.image_encoder": "x"}
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(tmp_path / "basis.safetensors"), tmp_path / "basis.safetensors", header
    )
    with pytest.raises(UserError, match="is no sketch of an image encoder"):
        read_basis(tmp_path)


@pytest.mark.parametrize(
    "encoder,name",
    [
        (CLIP, CLIP),
        ("/home/me/models/clip-vit-large-patch14", CLIP),
        ("clip-vit-large-patch14", CLIP),
        ("C:\\models\\siglip2-base-patch16-224", SIGLIP),
        ("other-clip", "other-clip"),
        ("/home/me/secret", "other"),
        ("models/mine", "other"),
        ("", None),
    ],
)
def test_no_path_is_published(encoder, name, basis, tmp_path, capsys):
    """config.yaml has one of the names that the published program knows, or says that it can't; never a path."""
    config, arrays = basis
    write_basis(tmp_path / "basis.safetensors", dataclasses.replace(config, encoder=encoder), arrays)
    text = (tmp_path / "config.yaml").read_text()
    kwargs = yaml.safe_load(text)["config"]["process"][0]["network"]["network_kwargs"]
    assert kwargs.get("external_query_model") == name
    assert "/home" not in text and "secret" not in text and "models" not in text
    said = capsys.readouterr().out
    assert ("used by lorweb_jax alone" in said) == (name not in (None, CLIP, SIGLIP))
    write_basis(tmp_path / "basis.safetensors", read_basis(tmp_path)[0], arrays)  # and again
    assert (tmp_path / "config.yaml").read_text() == text


def test_file_without_a_sketch_gets_none(tmp_path):
    config, arrays = read_basis(golden_dir() / "basis_a.safetensors")
    write_basis(tmp_path / "basis.safetensors", config, arrays)
    assert Checkpoint(tmp_path / "basis.safetensors").metadata == {"format": "pt"}


def test_runs(basis, tmp_path):
    """A run that noted its encoder, one whose config names a folder that is still the same, and one that is gone."""
    config, arrays = basis
    write_run(tmp_path / "noted", config, arrays)
    assert basis_of_run(tmp_path / "noted")[0] == config
    from lorweb_jax.common.fingerprint import of_folder

    there = encoder(tmp_path / "clip-vit-large-patch14")
    write_run(tmp_path / "run", dataclasses.replace(config, encoder=str(there), encoder_sketch=""), arrays)
    (tmp_path / "run" / "sources.json").write_text(json.dumps({"basis.encoder": of_folder(there)}))
    assert basis_of_run(tmp_path / "run")[0] == dataclasses.replace(config, encoder=CLIP)
    shutil.rmtree(there)
    assert basis_of_run(tmp_path / "run")[0] == dataclasses.replace(config, encoder=CLIP, encoder_sketch="")
    (tmp_path / "run" / "encoder.json").write_text(json.dumps({"name": "other-clip", "sketch": config.encoder_sketch}))
    assert basis_of_run(tmp_path / "run")[0] == config
    (tmp_path / "run" / "encoder.json").write_text(json.dumps({"name": "other-clip", "sketch": "x"}))
    with pytest.raises(UserError, match="encoder.json holds no sketch"):
        basis_of_run(tmp_path / "run")
