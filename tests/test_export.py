"""Ordinary LoRAs from a basis, against torch and diffusers; the export commands."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from golden import golden_dir

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.formats import basis_file, lora_file, lora_read
from lorweb_jax.common.errors import UserError
from lorweb_jax.export import main
from lorweb_jax.files.state import build
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.pipeline import adapters
from lorweb_jax.pipeline.pretrained import load_transformer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def basis():
    return basis_file.read_basis(golden_dir() / "basis_a.safetensors")


@pytest.fixture(scope="module")
def coefficients(basis):
    """The published implementation's coefficients for the first example of case a: {path: [l, n]}."""
    case = np.load(golden_dir() / "case_a.npz")
    return {
        path: np.stack([case[f"mix/{lora_file.layer_name(path, block)}"][0] for block in range(len(parts["a"]))])
        for path, parts in basis[1].items()
    }


def block_linears_of(pipeline: Path) -> dict:
    return backbone(FluxConfig.from_json(json.loads((pipeline / "transformer" / "config.json").read_text()))).adapted


@pytest.fixture(scope="module")
def layers():
    return block_linears_of(golden_dir() / "tiny_pipeline")


def inputs(torch, case, example=0):
    """The first example of case a as the transformer's keyword arguments."""
    batch = {
        name: torch.tensor(case[name][example : example + 1])
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
    }
    return batch | {name: torch.tensor(case[name]) for name in ("img_ids", "txt_ids")}


def velocity(torch, model, case):
    with torch.no_grad():
        return model(**inputs(torch, case), return_dict=False)[0].numpy()


@pytest.fixture(scope="module")
def transformer():
    diffusers = pytest.importorskip("diffusers")
    folder = golden_dir() / "tiny_pipeline" / "transformer"
    return lambda: diffusers.FluxTransformer2DModel.from_pretrained(folder).eval()


def relative(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("alpha", [False, True])
def test_diffusers_gives_the_basis_velocity(alpha, basis, coefficients, transformer, tmp_path):
    """The exported LoRA, loaded by diffusers, gives the published code's velocity: relative error <= 1e-5."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from diffusers import FluxKontextPipeline

    factors = lora_file.mixed_factors(basis[1], coefficients)
    lora_file.write_lora(tmp_path / "edit.safetensors", factors, alpha=alpha)
    model = transformer()
    pipeline = FluxKontextPipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
    )
    pipeline.load_lora_weights(tmp_path, weight_name="edit.safetensors")
    case = np.load(golden_dir() / "case_a.npz")
    found = velocity(torch, model, case)
    assert relative(found, case["output"][:1]) <= 1e-5
    assert relative(found, case["base_output"][:1]) > 1e-3


def test_scale_and_weights_in_torch(basis, coefficients, transformer, tmp_path):
    """load_lora_adapter, scale 0.7, against W + scale · Σ c A B added into torch's weights: 1e-5."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    factors = lora_file.mixed_factors(basis[1], coefficients, scale=0.7)
    lora_file.write_lora(tmp_path / "edit.safetensors", factors)
    adapted, merged = transformer(), transformer()
    adapted.load_lora_adapter(
        {
            name: torch.tensor(array)
            for name, array in safetensors.numpy.load_file(tmp_path / "edit.safetensors").items()
        },
        prefix="transformer",
    )
    for path, parts in basis[1].items():
        for block in range(len(parts["a"])):
            update = 0.7 * np.einsum(
                "n,nir,nro->oi",
                *(x.astype(np.float64) for x in (coefficients[path][block], parts["a"][block], parts["b"][block])),
            )
            with torch.no_grad():
                merged.get_submodule(lora_file.layer_name(path, block)).weight += torch.tensor(update).float()
    case = np.load(golden_dir() / "case_a.npz")
    assert relative(velocity(torch, adapted, case), velocity(torch, merged, case)) <= 1e-5


def test_one_member_is_an_ordinary_lora(layers, transformer, tmp_path):
    """A basis of N = 1 in our transformer, from a LoRA file with an alpha, against the same file in diffusers:
    relative error <= 1e-5."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    rng = np.random.default_rng(0)
    tensors = {}
    for path, layer in layers.items():
        for block in range(layer.depth):
            name = "transformer." + lora_file.layer_name(path, block)
            tensors |= {
                f"{name}.lora_A.weight": rng.normal(size=(3, layer.inputs)).astype(np.float32) * layer.inputs**-0.5,
                f"{name}.lora_B.weight": rng.normal(size=(layer.outputs, 3)).astype(np.float32) * 0.2,
                f"{name}.alpha": np.array(1.5, np.float32),
            }
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    theirs = transformer()
    from diffusers import FluxKontextPipeline

    FluxKontextPipeline(
        scheduler=None,
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=theirs,
    ).load_lora_weights(tmp_path, weight_name="x.safetensors")
    case = np.load(golden_dir() / "case_a.npz")
    expected = velocity(torch, theirs, case)

    config, flat = load_transformer(golden_dir() / "tiny_pipeline" / "transformer")
    flux = build(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0)), flat)
    basis = Basis.from_arrays(*lora_read.read_lora(tmp_path / "x.safetensors", layers))
    found = nnx.jit(lambda flux, basis, arrays: flux(*arrays, basis.adapters(basis.coefficients(batch=1))))(
        flux, basis, tuple(tensor.numpy() for tensor in inputs(torch, case).values())
    )
    assert relative(np.asarray(found), expected) <= 1e-5
    assert relative(case["base_output"][:1], expected) > 1e-3


@pytest.mark.parametrize("rank", [1, 5, 32])
def test_truncation_is_the_best_there_is(rank, basis, coefficients):
    """Update and error against numpy's SVD of the full [i, o] product in float64, to 1e-5 of the largest value."""
    arrays = {path: parts for path, parts in basis[1].items() if "attn.to_q" in path or "proj_out" in path}
    factors = lora_file.mixed_factors(arrays, coefficients)
    cut, error = lora_file.truncate(factors, rank)
    lost = norm = 0.0
    for path, (a, b) in factors.items():
        assert cut[path].a.shape[2] == cut[path].b.shape[1] == rank
        for block in range(len(a)):
            full = a[block].astype(np.float64) @ b[block]
            u, s, vt = np.linalg.svd(full, full_matrices=False)
            best = (u[:, :rank] * s[:rank]) @ vt[:rank]
            assert np.abs(cut[path].a[block] @ cut[path].b[block] - best).max() <= 1e-5 * s[0]
            expected = np.sqrt(np.square(s[rank:]).sum() / np.square(s).sum())
            assert abs(error.layers[lora_file.layer_name(path, block)] - expected) <= 1e-6
            lost, norm = lost + np.square(s[rank:]).sum(), norm + np.square(s).sum()
    assert abs(error.overall - np.sqrt(lost / norm)) <= 1e-6


def test_bad_rank_and_coefficients(basis, coefficients):
    factors = lora_file.mixed_factors(basis[1], coefficients)
    for rank in (0, 33):
        with pytest.raises(UserError, match=f"rank is {rank}; it must be from 1 to 32"):
            lora_file.truncate(factors, rank)
    with pytest.raises(UserError, match="for one analogy"):
        lora_file.mixed_factors(basis[1], {path: c[:, :3] for path, c in coefficients.items()})


def test_lora_as_basis(basis, coefficients, layers, tmp_path):
    """Read back, the LoRA is a basis of one member with the same update, alpha counted in; file -> basis -> file."""
    factors = lora_file.mixed_factors(basis[1], coefficients)
    lora_file.write_lora(tmp_path / "x.safetensors", factors, alpha=True)
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    name = "transformer.transformer_blocks.1.ff.net.2"
    tensors[f"{name}.alpha"] = np.array(16, np.float32)
    for part in ("lora_A.weight", "lora_B.weight", "alpha"):
        del tensors[f"transformer.transformer_blocks.0.attn.to_q.{part}"]
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    config, arrays = lora_read.read_lora(tmp_path / "x.safetensors", layers)
    assert (config.size, config.rank, config.query) == (1, 32, "fixed")
    again = lora_file.mixed_factors(arrays, {path: np.ones(parts["a"].shape[:2]) for path, parts in arrays.items()})
    for path in factors:
        for block in range(len(factors[path].a)):
            layer = lora_file.layer_name(path, block)
            factor = {"transformer_blocks.1.ff.net.2": 0.5, "transformer_blocks.0.attn.to_q": 0.0}.get(layer, 1.0)
            np.testing.assert_array_equal(
                again[path].a[block] @ again[path].b[block], factor * (factors[path].a[block] @ factors[path].b[block])
            )


def export(*arguments) -> None:
    main([str(argument) for argument in arguments])


def test_published_to_checkpoint_to_published(tmp_path, capsys):
    """Both commands in a row give byte-equal tensors, float16 kept by the checkpoint too."""
    pipeline = golden_dir() / "tiny_pipeline"
    source = golden_dir() / "basis_a_fp16.safetensors"
    export("checkpoint", source, tmp_path / "run", "--pipeline", pipeline)
    assert "N = 8, r = 4, 46 layers" in capsys.readouterr().out
    config, arrays = adapters.basis_of_run(tmp_path / "run")
    assert config == basis_file.read_basis(source)[0]
    assert adapters.load_basis(tmp_path / "run", block_linears_of(pipeline))[0] == config
    export("published", tmp_path / "run", tmp_path / "out" / "b.safetensors", "--dtype", "float16")
    ours, theirs = (safetensors.numpy.load_file(file) for file in (tmp_path / "out" / "b.safetensors", source))
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == array.tobytes() for key, array in theirs.items())


def test_lora_command(basis, coefficients, tmp_path, capsys):
    """A LoRA of rank 32 in, the nearest of rank 8 out in float16; its error is the one printed, to float16's 1e-3."""
    full = lora_file.mixed_factors(basis[1], coefficients)
    lora_file.write_lora(tmp_path / "full.safetensors", full)
    export(
        "lora",
        tmp_path / "full.safetensors",
        tmp_path / "cut.safetensors",
        "--rank",
        8,
        "--dtype",
        "float16",
        "--pipeline",
        golden_dir() / "tiny_pipeline",
    )
    stated = float(re.search(r"off by ([\d.e-]+) of its norm", capsys.readouterr().out)[1])
    cut = safetensors.numpy.load_file(tmp_path / "cut.safetensors")
    lost = norm = 0.0
    for path, (a, b) in full.items():
        for block in range(len(a)):
            name = "transformer." + lora_file.layer_name(path, block)
            down, up = (cut[f"{name}.lora_{side}.weight"] for side in "AB")
            assert down.dtype == np.float16 and down.shape[0] == up.shape[1] == 8
            update = (a[block] @ b[block]).T
            lost += np.square(update - up.astype(np.float32) @ down.astype(np.float32)).sum()
            norm += np.square(update).sum()
    assert abs(np.sqrt(lost / norm) - stated) <= 1e-3
    with pytest.raises(UserError, match="--b was given, but the adapter, which has no router, says what is exported"):
        again = ["lora", tmp_path / "full.safetensors", tmp_path / "no.safetensors", "--b", "b.png"]
        export(*again, "--pipeline", golden_dir() / "tiny_pipeline")
    assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize("names", ["kohya", "comfyui"])
def test_lora_in_other_names(names, basis, coefficients, layers, tmp_path):
    """The command gives a LoRA other names and an alpha; read again, its update is the same to 1e-6."""
    full = lora_file.mixed_factors(basis[1], coefficients)
    lora_file.write_lora(tmp_path / "full.safetensors", full)
    export(
        "lora",
        tmp_path / "full.safetensors",
        tmp_path / "x.safetensors",
        "--format",
        names,
        "--alpha",
        8,
        "--pipeline",
        golden_dir() / "tiny_pipeline",
    )
    keys = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    start = {"kohya": "lora_unet_single_blocks_1_linear1", "comfyui": "diffusion_model.single_blocks.1.linear1"}[names]
    assert keys[f"{start}.alpha"] == 8 and keys[f"{start}.lora_up.weight"].shape == (7 * 128, 4 * 32)
    _, arrays = lora_read.read_lora(tmp_path / "x.safetensors", layers)
    for path, (a, b) in full.items():
        for block in range(len(a)):
            update = arrays[path]["a"][block, 0] @ arrays[path]["b"][block, 0]
            assert np.abs(update - a[block] @ b[block]).max() <= 1e-6 * np.abs(a[block] @ b[block]).max()


def test_commands_refuse_in_one_sentence(tmp_path):
    basis = golden_dir() / "basis_a.safetensors"
    pipeline = golden_dir() / "tiny_pipeline"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("kept")
    for arguments, code, message in [
        (("checkpoint", basis, tmp_path / "full"), 1, "exists already"),
        (("published", tmp_path / "full", tmp_path / "b.safetensors"), 1, "config.json does not exist"),
        (("lora", basis, tmp_path / "b.bin", "--pipeline", pipeline), 2, "must end in .safetensors"),
        (("lora", basis, tmp_path / "b.safetensors", "--pipeline", pipeline), 2, "--a, --a2, --b not given"),
        (
            ("lora", basis, tmp_path / "b.safetensors", "--pipeline", pipeline, "--alpha", "0"),
            2,
            "not a number above 0",
        ),
    ]:
        with pytest.raises(UserError, match=message) as error:
            export(*arguments)
        assert error.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    done = subprocess.run(
        [sys.executable, "-m", "lorweb_jax.export", "published", tmp_path, tmp_path / "b.safetensors"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
