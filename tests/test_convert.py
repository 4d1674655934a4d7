"""FLUX transformer and autoencoder files in both layouts, against diffusers' own models and converters."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.state import build, shapes
from lorweb_jax.files.table import Layout
from lorweb_jax.models.autoencoder import table as vae_table
from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig
from lorweb_jax.models.flux1.config import FluxConfig, black_forest_config
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.pipeline import pretrained

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def pipeline() -> Path:
    return golden_dir() / "tiny_pipeline"


@pytest.fixture(scope="module")
def black_forest(pipeline, tmp_path_factory) -> Path:
    """The tiny pipeline's transformer and autoencoder in Black Forest Labs' layout."""
    out = tmp_path_factory.mktemp("black_forest")
    for kind in ("transformer", "vae"):
        pretrained.convert(pretrained.recognise(pipeline / kind), "black_forest", out)
    return out


def same(ours: dict, theirs: dict) -> None:
    """Names, shapes, dtypes and bytes are equal."""
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].shape == theirs[name].shape and ours[name].dtype == theirs[name].dtype, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_load_then_save_gives_the_same_file(kind, pipeline, tmp_path):
    load = {"transformer": pretrained.load_transformer, "vae": pretrained.load_vae}[kind]
    save = {"transformer": pretrained.save_transformer, "vae": pretrained.save_vae}[kind]
    config, flat = load(pipeline / kind)
    save(tmp_path, config, flat)
    same(safetensors.numpy.load_file(tmp_path / WEIGHTS), safetensors.numpy.load_file(pipeline / kind / WEIGHTS))
    assert read_json(tmp_path / "config.json") == json.loads((pipeline / kind / "config.json").read_text())
    save(tmp_path, config, flat, np.float16)
    half = load(tmp_path)[1]
    assert all((half[path] == flat[path].astype(np.float16)).all() for path in flat)


def test_transformer_is_diffusers_own(pipeline, tmp_path):
    """What save_transformer writes is exactly diffusers' state_dict; sharded too."""
    diffusers = pytest.importorskip("diffusers")
    config, flat = pretrained.load_transformer(pipeline / "transformer")
    rng = np.random.default_rng(0)
    flat = {path: rng.normal(size=array.shape).astype(np.float32) for path, array in flat.items()}
    build(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0)), flat)
    pretrained.save_folder(
        tmp_path, config, flat, backbone(FluxConfig.from_json(config)).table("diffusers"), max_shard_bytes=1_000_000
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    theirs = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in theirs.items()} == Checkpoint(tmp_path).shapes
    np.testing.assert_array_equal(
        theirs["transformer_blocks.1.attn.to_out.0.weight"], flat["transformer_blocks.attn.to_out_0.kernel"][1].T
    )
    np.testing.assert_array_equal(
        theirs["single_transformer_blocks.2.proj_out.bias"], flat["single_transformer_blocks.proj_out.bias"][2]
    )
    pretrained.save_transformer(tmp_path, config, flat)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", WEIGHTS]


def test_black_forest_transformer_against_diffusers_converter(pipeline, black_forest, monkeypatch):
    """diffusers' own converter turns our single file into the folder's tensors, and we turn it back."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    split = torch.split
    # Its sizes are written for d = 3072: the same proportions of a narrower tensor.
    monkeypatch.setattr(
        utils.torch,
        "split",
        lambda tensor, sizes, dim: split(tensor, [size * tensor.shape[0] // sum(sizes) for size in sizes], dim),
    )
    single = safetensors.numpy.load_file(black_forest / "flux1-kontext.safetensors")
    assert single["double_blocks.1.img_attn.qkv.weight"].shape == (384, 128)
    assert single["single_blocks.2.linear1.bias"].shape == (896,)
    theirs = utils.convert_flux_transformer_checkpoint_to_diffusers(
        {name: torch.tensor(array) for name, array in single.items()}
    )
    same(
        {name: tensor.numpy() for name, tensor in theirs.items()},
        safetensors.numpy.load_file(pipeline / "transformer" / WEIGHTS),
    )


def test_black_forest_autoencoder_against_diffusers_converter(pipeline, black_forest):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    single = safetensors.numpy.load_file(black_forest / "ae.safetensors")
    assert single["encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    theirs = utils.convert_ldm_vae_checkpoint(
        {name: torch.tensor(array) for name, array in single.items()},
        json.loads((pipeline / "vae" / "config.json").read_text()),
    )
    same(
        {name: tensor.numpy() for name, tensor in theirs.items()},
        safetensors.numpy.load_file(pipeline / "vae" / WEIGHTS),
    )


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_there_and_back(kind, pipeline, black_forest, tmp_path):
    file = black_forest / pretrained.KINDS[kind].single_file
    source = pretrained.recognise(file, pipeline / kind / "config.json")
    assert (source.kind, source.layout) == (kind, "black_forest")
    folder, _ = pretrained.convert(source, "diffusers", tmp_path)
    same(safetensors.numpy.load_file(folder / WEIGHTS), safetensors.numpy.load_file(pipeline / kind / WEIGHTS))


def test_configs_of_real_single_files_are_read_off_their_shapes(pipeline):
    """Full-size shapes: the transformer has 11,901,408,320 parameters, the autoencoder 83,819,683."""
    config = FluxConfig()
    real = shapes(lambda: Flux(config, rngs=nnx.Rngs(0)))
    assert sum(np.prod(shape.shape, dtype=np.int64) for shape in real.values()) == 11_901_408_320
    found = black_forest_config(Layout(backbone(config).table("black_forest"), real).tensors)
    assert FluxConfig.from_json(found) == config
    config = VAEConfig()
    real = shapes(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    assert sum(np.prod(shape.shape, dtype=np.int64) for shape in real.values()) == 83_819_683
    found = vae_table.black_forest_config(Layout(vae_table.black_forest(4, 2), real).tensors)
    assert VAEConfig.from_json(found) == config
    tiny = FluxConfig.from_json(read_json(pipeline / "transformer" / "config.json"))
    tensors = Layout(backbone(tiny).table("black_forest"), shapes(lambda: Flux(tiny, rngs=nnx.Rngs(0)))).tensors
    with pytest.raises(UserError, match="width 32, .* --model-config"):
        black_forest_config(tensors)


def test_strict_and_one_sentence(pipeline, black_forest, tmp_path):
    folder = shutil.copytree(pipeline / "transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3, "joint_attention_dim": 40}))
    with pytest.raises(UserError, match=r"− transformer_blocks.2.norm1.linear.weight(.|\n)*more"):
        pretrained.load_transformer(folder)
    (folder / "config.json").write_text(json.dumps(config | {"guidance_embeds": False}))
    with pytest.raises(UserError, match=r"\+ time_text_embed.guidance_embedder.linear_1.bias"):
        pretrained.load_transformer(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="config.json does not exist"):
        pretrained.load_transformer(folder)
    with pytest.raises(UserError, match="holds a FLUX vae, expected a transformer"):
        pretrained.load_transformer(pipeline / "vae")
    with pytest.raises(UserError, match="is a CLIP or SigLIP model with its text encoder, not a FLUX"):
        pretrained.recognise(pipeline / "text_encoder")
    with pytest.raises(UserError, match="exists already"):
        pretrained.convert(pretrained.recognise(pipeline / "vae"), "black_forest", black_forest)


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_flux_weights.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_command(pipeline, black_forest, tmp_path):
    """A pipeline folder to single files, in bfloat16; then a refusal that writes nothing."""
    done = run(pipeline, "--to", "black-forest", "--out", tmp_path / "bf", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    assert "126 tensors" in done.stdout and "176 tensors" in done.stdout and "bfloat16" in done.stdout
    single = Checkpoint(tmp_path / "bf" / "flux1-kontext.safetensors")
    expected = Checkpoint(black_forest / "flux1-kontext.safetensors")
    assert single.shapes == expected.shapes
    name = "double_blocks.0.txt_attn.qkv.weight"
    assert (single.read(name) == expected.read(name).astype(ml_dtypes.bfloat16)).all()
    verified = run("--verify", tmp_path / "bf")
    assert verified.returncode == 0 and verified.stdout.count("as they were written") == 2, verified.stderr
    refused = run(
        black_forest / "flux1-kontext.safetensors",
        "--to",
        "diffusers",
        "--out",
        tmp_path / "no",
        "--model-config",
        pipeline / "vae" / "config.json",
    )
    assert refused.returncode == 1 and refused.stderr.startswith("error: ") and not (tmp_path / "no").exists()
