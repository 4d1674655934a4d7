"""Checkpoints as people have them: all in one file, fp8 with scales, GGUF; what isn't FLUX is called by its name."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden import golden_dir
from lora_files import DOWN_UP, flat, named

from lorweb_jax.common.errors import UserError
from lorweb_jax.files import gguf_file, safetensors_io
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.pipeline import pretrained
from lorweb_jax.pipeline.sources import recognise, recognise_all

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = golden_dir() / "tiny_pipeline"
CONFIGS = [PIPELINE / kind / "config.json" for kind in ("transformer", "vae")]
WEIGHTS = "diffusion_pytorch_model.safetensors"
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """The tiny pipeline's transformer and autoencoder in Black Forest Labs' names: {kind: tensors}."""
    out = tmp_path_factory.mktemp("single")
    files = {
        kind: pretrained.convert(pretrained.recognise(PIPELINE / kind), "black_forest", out)[0]
        for kind in ("transformer", "vae")
    }
    return {kind: safetensors.numpy.load_file(file) for kind, file in files.items()}


def prefixed(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in tensors.items()}


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    safetensors_io.write(path, {name: np.asarray(array) for name, array in tensors.items()}, metadata)
    return path


def converted(file: Path, out: Path, configs=CONFIGS[:1], dtype=None) -> dict[str, np.ndarray]:
    """The transformer that the converter makes of a file, in diffusers' names."""
    (source,) = recognise_all(file, configs).sources
    folder, _ = pretrained.convert(source, "diffusers", out, dtype)
    return safetensors.numpy.load_file(folder / WEIGHTS)


def equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and (found[name] == array).all(), name


TEXT = {
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": np.zeros((2, 2)),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight": np.zeros((2, 2)),
    "text_encoders.t5xxl.logit_scale": np.zeros(1),
}


@pytest.mark.parametrize("vae", ["vae.", "first_stage_model."])
def test_all_in_one(vae, single, tmp_path):
    """Both models are taken, byte for byte those of the folders; what is left out is counted by what it is."""
    file = write(
        tmp_path / "all.safetensors",
        prefixed("model.diffusion_model.", single["transformer"]) | prefixed(vae, single["vae"]) | TEXT,
    )
    found = recognise_all(file, CONFIGS)
    assert found.left_out == ["CLIP's text encoder (1 tensors)", "T5's text encoder (2 tensors)"]
    for source in found.sources:
        folder, _ = pretrained.convert(source, "diffusers", tmp_path / "out")
        equal(
            safetensors.numpy.load_file(folder / WEIGHTS), safetensors.numpy.load_file(PIPELINE / source.kind / WEIGHTS)
        )
    assert {source.kind for source in found.sources} == {"transformer", "vae"}
    with pytest.raises(UserError, match="all.safetensors, an all-in-one checkpoint: its transformer has attention"):
        recognise_all(file)


def scaled(
    tensors: dict[str, np.ndarray], spelling: str, dtype: np.dtype = E4M3, rows: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(a file's tensors, the float32 weights that they stand for): matrices in fp8 with scales, the rest as it is."""
    file, expected, largest = {}, {}, float(ml_dtypes.finfo(dtype).max)
    for name, array in tensors.items():
        if array.ndim != 2:
            file[name] = expected[name] = array
            continue
        scale = np.abs(array).max(axis=1 if rows else None, keepdims=rows).astype(np.float32) / np.float32(largest)
        file[name] = (array / scale).astype(dtype)
        file[name.removesuffix(".weight") + spelling] = scale
        of_inputs = "scale_input" if spelling == ".scale_weight" else "input_scale"
        file[name.removesuffix("weight") + of_inputs] = np.ones(())
        expected[name] = file[name].astype(np.float32) * scale
    return file, expected


@pytest.mark.parametrize(
    "spelling,rows,dtype",
    [
        (".scale_weight", False, E4M3),
        (".weight_scale", False, E4M3),
        (".weight_scale", True, E4M3),
        (".scale_weight", False, E5M2),
    ],
)
def test_scaled_fp8(spelling, rows, dtype, single, tmp_path):
    """Each weight is its fp8 number times its scale, to the bit in float32: converted, and loaded as it is."""
    file, expected = scaled(single["transformer"], spelling, dtype, rows)
    file |= {"scaled_fp8": np.zeros(2, dtype)} if spelling == ".scale_weight" else {}
    plain = converted(write(tmp_path / "plain.safetensors", expected), tmp_path / "plain")
    path = write(tmp_path / "fp8.safetensors", prefixed("model.diffusion_model.", file))
    equal(converted(path, tmp_path / "out"), plain)
    half = converted(path, tmp_path / "half", dtype=np.float16)
    equal(half, {name: array.astype(np.float16) for name, array in plain.items()})
    weights, rows_ = recognise(path, CONFIGS[0]).checkpoint, slice(7, 20)
    name = "single_blocks.1.linear1.weight"
    assert (weights.read(name, rows_.start, rows_.stop) == expected[name][rows_]).all()


def test_fp8_of_newer_files(single, tmp_path):
    """ComfyUI's notes of each layer's format are read; formats that aren't are named. Plain fp8 stays fp8."""
    file, expected = scaled(single["transformer"], ".weight_scale")
    layer = "single_blocks.0.linear1"
    note = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    path = write(tmp_path / "x.safetensors", file | {f"{layer}.comfy_quant": note})
    assert (recognise(path, CONFIGS[0]).checkpoint.read(f"{layer}.weight") == expected[f"{layer}.weight"]).all()
    other = np.frombuffer(json.dumps({"format": "nvfp4"}).encode(), np.uint8)
    with pytest.raises(UserError, match=f'x.safetensors says that "{layer}" is stored as "nvfp4"'):
        recognise(write(path, file | {f"{layer}.comfy_quant": other}), CONFIGS[0])
    with pytest.raises(UserError, match='stored as "mxfp8"'):
        header = json.dumps({"layers": {layer: {"format": "mxfp8"}}})
        recognise(write(path, file, _quantization_metadata=header), CONFIGS[0])
    plain = {
        name: array.astype(E4M3 if array.ndim == 2 else np.float32) for name, array in single["transformer"].items()
    }
    written, _ = pretrained.convert(recognise(write(path, plain), CONFIGS[0]), "diffusers", tmp_path)
    assert Checkpoint(written).dtypes() == {"float32": 70, "float8_e4m3fn": 56}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"x.scale_weight": np.ones(())}, 'the scale "x.scale_weight", but no "x.weight"'),
        ({"single_blocks.0.linear1.scale_weight": np.array(-1.0)}, "holds -1.0, expected finite"),
        ({"single_blocks.0.linear1.scale_weight": np.ones((7, 1))}, "one number or one a row"),
        ({"single_blocks.0.linear1.weight_scale": np.ones(())}, "two scales of"),
        ({"single_blocks.0.linear1.weight": np.ones((896, 128), np.int8)}, "in int8 with a scale"),
    ],
)
def test_scales_that_make_no_sense(change, message, single, tmp_path):
    file, _ = scaled(single["transformer"], ".scale_weight")
    with pytest.raises(UserError, match=f"x.safetensors.*{message}"):
        recognise(write(tmp_path / "x.safetensors", file | change), CONFIGS[0])


def gguf_of(path: Path, tensors: dict[str, np.ndarray], kinds: list[str]) -> tuple[Path, dict[str, np.ndarray]]:
    """(a GGUF file of matrices in these kinds in turn, what the gguf package makes of them again)."""
    gguf = pytest.importorskip("gguf")
    writer, expected = gguf.GGUFWriter(path, "flux"), {}
    for number, (name, array) in enumerate(tensors.items()):
        fits = array.ndim == 2 and array.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType[kinds[number % len(kinds)] if fits else "F32"]
        packed = gguf.quantize(array, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        expected[name] = gguf.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, expected


@pytest.mark.parametrize("kinds", [["F16", "BF16", "Q8_0"], ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]])
def test_gguf(kinds, single, tmp_path):
    """A GGUF transformer becomes what the package unpacks, to the bit, whatever is fused in it."""
    file, expected = gguf_of(tmp_path / "flux1-kontext-Q.gguf", single["transformer"], kinds)
    equal(
        converted(file, tmp_path / "out", dtype=np.float32),
        converted(write(tmp_path / "x.safetensors", expected), tmp_path / "expected"),
    )
    weights = recognise(file, CONFIGS[0]).checkpoint
    name = "double_blocks.1.txt_attn.qkv.weight"
    assert (weights.read(name, 5, 90).astype(np.float32) == expected[name][5:90]).all()


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_packed_rows(kind, tmp_path):
    """Kinds that the package only unpacks: rows of a tensor against the whole one."""
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (10, 512 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    checkpoint, architecture = gguf_file.read_gguf(tmp_path / "x.gguf")
    assert architecture == "flux" and checkpoint.shapes == {"x": (10, 512)} and checkpoint.dtypes() == {kind.name: 1}
    np.testing.assert_array_equal(checkpoint.read("x", 3, 8), gguf.dequantize(data, kind)[3:8])


def test_damaged_gguf(single, tmp_path):
    """Cut anywhere in its header, or with any byte of it changed: a sentence or other names, never more."""
    file, _ = gguf_of(tmp_path / "x.gguf", {"a": np.ones((4, 32), np.float32), "b": np.ones(3, np.float32)}, ["Q8_0"])
    data, bad = file.read_bytes(), tmp_path / "bad.gguf"
    random = np.random.default_rng(0)
    changed = [data[:n] for n in range(4, 200, 7)]
    for _ in range(300):
        byte = int(random.integers(4, 200))
        changed.append(data[:byte] + bytes([int(random.integers(256))]) + data[byte + 1 :])
    for mutated in changed:
        bad.write_bytes(mutated)
        try:
            gguf_file.read_gguf(bad)
        except UserError as error:
            assert str(error).startswith(str(bad)) and "\n" not in str(error)


ONE = np.zeros((2, 2), np.float32)
NAMED = {
    "a LoRA in Black Forest Labs' names": {
        "double_blocks.0.img_attn.qkv.lora_A.weight": ONE,
        "single_blocks.0.linear1.lora_A.weight": ONE,
    },
    "a LoRA in kohya's names": named({"double_blocks.0.img_mlp.0": (ONE, ONE)}, "lora_unet_", DOWN_UP, flat),
    "a LoRWeB basis": {"transformer.single_transformer_blocks.0.proj_out.lora_keys": ONE},
    "packed in bitsandbytes' 4 bits": {
        "single_blocks.0.linear1.weight": ONE,
        "single_blocks.0.linear1.weight.absmax": ONE,
    },
    "packed by SVDQuant": {
        "single_transformer_blocks.0.mlp_fc1.qweight": ONE,
        "single_transformer_blocks.0.mlp_fc1.wscales": ONE,
    },
    "in fp8 with a scale for each block": {"single_blocks.0.linear1.weight_scale_inv": ONE},
    "a FLUX.2 transformer": {"single_blocks.0.linear1.weight": ONE, "double_stream_modulation_img.lin.weight": ONE},
    "a Chroma transformer": {"single_blocks.0.linear1.weight": ONE, "distilled_guidance_layer.in_proj.weight": ONE},
    "a Stable Diffusion 1, 2 or XL model": {
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight": ONE,
        "first_stage_model.encoder.down.0.block.0.conv1.weight": ONE,
    },
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": ONE},
    "a CLIP or SigLIP model with its text encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": ONE},
    "an image encoder": {"vision_model.encoder.layers.0.mlp.fc1.weight": ONE},
    r'holds 1 tensors \("what", …\)': {"what": ONE},
}


@pytest.mark.parametrize("name", NAMED)
def test_what_it_is(name, tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}/x.safetensors (is )?{name}"):
        recognise_all(write(tmp_path / "x.safetensors", NAMED[name]))


@pytest.mark.parametrize(
    "begins,what",
    [
        (b"PK\x03\x04", "PyTorch's pickle"),
        (b"version https://git-lfs.", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'{"a": 1}', "JSON text"),
    ],
)
def test_what_it_is_by_its_beginning(begins, what, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(begins + bytes(100))
    with pytest.raises(UserError, match=f"x.safetensors is not a safetensors file, but .*{what}"):
        recognise_all(tmp_path / "x.safetensors")


def test_incomplete_files_are_named(single, tmp_path):
    """What is missing is told with the file's name, and that it is an all-in-one checkpoint if it is one."""
    few = {
        name: array for name, array in single["transformer"].items() if name.startswith(("img_in", "single_blocks.0"))
    }
    with pytest.raises(UserError, match="x.safetensors: the FLUX transformer has no double_blocks"):
        recognise_all(write(tmp_path / "x.safetensors", few))
    file = write(tmp_path / "x.safetensors", prefixed("model.diffusion_model.", few) | TEXT)
    with pytest.raises(UserError, match="x.safetensors, an all-in-one checkpoint: its transformer has no double"):
        recognise_all(file)


def test_command(single, tmp_path):
    """The converter on an all-in-one checkpoint with scaled fp8: two folders, and lines that say what became of it."""
    file, _ = scaled(single["transformer"], ".scale_weight")
    path = write(
        tmp_path / "all.safetensors", prefixed("model.diffusion_model.", file) | prefixed("vae.", single["vae"]) | TEXT
    )
    command = [
        sys.executable,
        ROOT / "tools" / "convert_flux_weights.py",
        path,
        "--to",
        "diffusers",
        "--out",
        tmp_path / "out",
        *(f"--model-config={config}" for config in CONFIGS),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out CLIP's text encoder (1 tensors), T5's" in done.stdout and " of scaled float8_e4m3fn" in done.stdout
    assert "become float32, without loss" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["transformer", "vae"]


def test_no_path_goes_into_a_converted_folder(single, tmp_path):
    """diffusers notes in config.json where a model once lay."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(CONFIGS[1].read_text()) | {"_name_or_path": "/home/me/secret"}))
    file = write(tmp_path / "ae.safetensors", single["vae"])
    folder, _ = pretrained.convert(recognise(file, config), "diffusers", tmp_path / "out")
    assert json.loads((folder / "config.json").read_text()) == json.loads(CONFIGS[1].read_text())
