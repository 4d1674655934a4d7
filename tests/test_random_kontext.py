"""The generator of random pipeline folders: full-size shapes counted, a small folder written and read."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from lorweb_jax.files.safetensors_io import Spec, shards_of
from lorweb_jax.files.table import Layout
from lorweb_jax.pipeline.folder import PipelineFolder

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def test_full_size_is_the_published_models(monkeypatch):
    """Parameter counts of the published files, and shards like the published: 3 of the transformer, 2 of T5-XXL."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import random_kontext as tool

    counts = {
        "transformer": (11_901_408_320, 3),
        "vae": (83_819_683, 1),
        "text_encoder": (123_060_480, 1),
        "text_encoder_2": (4_762_310_656, 2),
        "clip_vision": (303_966_208, 1),
    }
    for part, (count, files) in counts.items():
        _, rows, shapes = tool.model(part, tool.SIZES["kontext"][part], None)
        tensors = Layout(rows, shapes).tensors
        assert sum(np.prod(shape, dtype=np.int64) for shape in tensors.values()) == count, part
        specs = {key: Spec(shape, np.dtype(np.float16)) for key, shape in tensors.items()}
        assert len(shards_of("model", specs, tool.shard_bytes(part, "kontext"))) == files, part


def test_small_folder(tmp_path):
    out = tmp_path / "random"
    command = [sys.executable, str(TOOLS / "random_kontext.py"), "--out", str(out), "--size", "small"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = PipelineFolder(out)
    assert folder.text_tokens == 512
    weights = folder.read()
    assert {path.split(".")[0] for path in weights} == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
    }
    assert all(array.dtype.name == "bfloat16" for array in weights.values())
    kernel = weights["transformer.single_transformer_blocks.proj_out.kernel"].astype(np.float32)
    assert abs(kernel.std() - 0.02) < 5e-4 and abs(kernel.mean()) < 5e-4
    assert np.abs(weights["vae.encoder.conv_norm_out.scale"].astype(np.float32) - 1).max() < 0.1
    assert "is there already" in subprocess.run(command, capture_output=True, text=True).stdout
