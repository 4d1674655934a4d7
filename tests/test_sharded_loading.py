"""Weights read straight into shards: the same numbers as unsharded reading, of every split, and no byte twice."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from golden import golden_dir
from jax.sharding import SingleDeviceSharding

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import Spec, write_stream
from lorweb_jax.files.sharded_loading import load_sharded
from lorweb_jax.files.table import LINEAR, Row, Stored
from lorweb_jax.nn.quantization import quantize
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.pretrained import open_model

PIPELINE = golden_dir() / "tiny_pipeline"

ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, safetensors.numpy, sys
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lorweb_jax.nn.quantization import DTYPES, quantize
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.sharded_loading import load_sharded
from lorweb_jax.pipeline.pretrained import open_model

folder = sys.argv[1]
_, stored = open_model(folder, "transformer")
theirs = safetensors.numpy.load_file(folder + "/diffusion_pytorch_model.safetensors")
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
layers = {"single_transformer_blocks.proj_out": (3, "proj_out")}
expected = {f"{path}.kernel": np.stack([theirs[f"{path.split('.')[0]}.{l}.{name}.weight"].T for l in range(depth)])
            for path, (depth, name) in layers.items()}
expected["x_embedder.kernel"] = theirs["x_embedder.weight"].T
expected["norm_out.linear.bias"] = theirs["norm_out.linear.bias"]

reads = []
read = Checkpoint.read
def counted(self, name, start=0, stop=None):
    array = read(self, name, start, stop)
    reads.append(array.nbytes)
    return array
Checkpoint.read = counted

def shape(path, array, dtype, split):
    return jax.ShapeDtypeStruct(array.shape, dtype, sharding=NamedSharding(mesh, P(*split[-array.ndim:])))

# Scales split as the codes' outputs, finer, or not at all: as sharding.py or a caller may ask.
cases = [((None, None, None), jnp.float32, "int8", None), ((None, "fsdp", "tensor"), jnp.bfloat16, "fp8", None),
         ((None, None, ("data", "fsdp")), jnp.float32, "int8", "tensor"),
         ((None, "tensor", ("data", "fsdp")), jnp.float32, "int8", ("data", "fsdp")),
         ((None, None, "tensor"), jnp.bfloat16, "int8", ("tensor", "fsdp")),
         ((None, ("data", "fsdp", "tensor"), None), jnp.float32, "fp8", None),
         ((None, None, ("tensor", "fsdp")), jnp.bfloat16, "int8", None)]
for split, dtype, kind, outputs in cases:
    wanted = {path: shape(path, array, dtype, split) for path, array in expected.items()}
    reads.clear()
    arrays = load_sharded(stored, wanted, streamed_above=1000)
    assert sum(reads) == sum(array.nbytes for array in expected.values()), (split, sum(reads))
    filled = load_sharded(stored, wanted)  # by the host, which is what small parameters and CPUs get
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(filled[path]), array.astype(dtype), err_msg=f"{path} {split}")
        assert arrays[path].sharding == wanted[path].sharding
        np.testing.assert_array_equal(np.asarray(arrays[path]), array.astype(dtype), err_msg=f"{path} {split}")
    kernel = "single_transformer_blocks.proj_out.kernel"
    array, scale = expected[kernel], kernel.replace("kernel", "scale")
    wanted = {kernel: shape(kernel, array, DTYPES[kind], split),
              scale: shape(scale, quantize(array, kind)[1], jnp.float32, (None, None, outputs))}
    for arrays in (load_sharded(stored, wanted, streamed_above=1000), load_sharded(stored, wanted)):
        for path, value in zip((kernel, scale), quantize(array, kind)):
            np.testing.assert_array_equal(np.asarray(arrays[path]).astype(np.float32), value.astype(np.float32))
# A split over blocks is put together on the host.
wanted = {"transformer_blocks.attn.to_q.kernel": jax.ShapeDtypeStruct((2, 128, 128), jnp.float32,
                                                                      sharding=NamedSharding(mesh, P("fsdp")))}
for path, array in load_sharded(stored, wanted, streamed_above=0).items():
    np.testing.assert_array_equal(np.asarray(array), stored.load()[path])
print("equal")
"""


def test_every_split_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(PIPELINE / "transformer")],
        text=True,
        capture_output=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert done.stdout == "equal\n", done.stderr


def on_one_device(stored, dtype=jnp.float32):
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(jax.devices()[0]))
        for path, shape in stored.layout.shapes.items()
    }


def test_fused_tensors_and_convolutions():
    """Of the autoencoder every weight, and of Black Forest Labs' fused, swapped tensors the parts, device-side too."""
    _, stored = open_model(PIPELINE / "vae", "vae")
    for limit in (0, None):
        arrays = load_sharded(stored, on_one_device(stored), limit)
        for path, array in stored.load().items():
            np.testing.assert_array_equal(np.asarray(arrays[path]), array, err_msg=path)


def test_fused_rows_and_swapped_halves(tmp_path):
    rng = np.random.default_rng(0)
    held = {f"layer.{l}.fused": rng.normal(size=(10, 4)).astype(np.float32) for l in range(3)}
    held["last"] = rng.normal(size=(8, 6, 1, 1)).astype(np.float32)
    write_stream(
        tmp_path / "model.safetensors", {key: Spec(a.shape, a.dtype) for key, a in held.items()}, held.__getitem__
    )
    rows = [
        Row("q.kernel", "layer.{l}.fused", LINEAR),
        Row("mlp.kernel", "layer.{l}.fused", LINEAR),
        Row("last.kernel", "last", (2, 3, 1, 0), swapped=True),
    ]
    shapes = {"q.kernel": (3, 4, 4), "mlp.kernel": (3, 4, 6), "last.kernel": (6, 8)}
    stored = Stored(Checkpoint(tmp_path), rows, {path: np.broadcast_to(0, shape) for path, shape in shapes.items()})
    arrays = load_sharded(stored, on_one_device(stored), streamed_above=0)
    fused = np.stack([held[f"layer.{l}.fused"] for l in range(3)])
    np.testing.assert_array_equal(arrays["q.kernel"], fused[:, :4].transpose(0, 2, 1))
    np.testing.assert_array_equal(arrays["mlp.kernel"], fused[:, 4:].transpose(0, 2, 1))
    np.testing.assert_array_equal(arrays["last.kernel"], np.roll(held["last"][:, :, 0, 0], 4, 0).T)
    cuts = stored.layout.read_cuts(stored.checkpoint, ("last.kernel", None), [((0, 6), (2, 5)), ((1, 3), (0, 8))])
    np.testing.assert_array_equal(cuts[(0, 6), (2, 5)], np.roll(held["last"], 4, 0)[2:5])
    np.testing.assert_array_equal(cuts[(1, 3), (0, 8)], np.roll(held["last"], 4, 0)[:, 1:3])


def test_what_files_do_not_have_is_refused():
    _, stored = open_model(PIPELINE / "transformer", "transformer")
    wanted = on_one_device(stored)
    wider = jax.ShapeDtypeStruct((64, 129), jnp.float32, sharding=wanted["x_embedder.kernel"].sharding)
    with pytest.raises(UserError, match=r"x_embedder.kernel \[64, 129\], and .* has \[64, 128\]"):
        load_sharded(stored, wanted | {"x_embedder.kernel": wider})
    with pytest.raises(UserError, match="nowhere.scale .* has no such weight"):
        load_sharded(stored, {"nowhere.scale": wider})


def test_a_pipeline_gives_the_parts_that_are_asked_for(monkeypatch):
    """Other parts' files are not even opened; quantised layers come as quantize makes them."""
    opened = []
    open_checkpoint = Checkpoint.__init__
    monkeypatch.setattr(
        Checkpoint, "__init__", lambda self, path: opened.append(path.name) or open_checkpoint(self, path)
    )
    folder = PipelineFolder(PIPELINE)
    path, device = "transformer.single_transformer_blocks.proj_mlp", SingleDeviceSharding(jax.devices()[0])
    wanted = {
        f"{path}.kernel": jax.ShapeDtypeStruct((3, 128, 512), jnp.int8, sharding=device),
        f"{path}.scale": jax.ShapeDtypeStruct((3, 1, 512), jnp.float32, sharding=device),
        "image_encoder.visual_projection.kernel": jax.ShapeDtypeStruct((32, 24), jnp.bfloat16, sharding=device),
    }
    read = folder.read(wanted)
    assert set(read) == set(wanted) and opened == ["transformer", "clip_vision"]
    files = safetensors.numpy.load_file(PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors")
    kernel = np.stack([files[f"single_transformer_blocks.{l}.proj_mlp.weight"].T for l in range(3)])
    codes, scale = quantize(kernel, "int8")
    np.testing.assert_array_equal(read[f"{path}.kernel"], codes)
    np.testing.assert_array_equal(read[f"{path}.scale"], scale)
    everything = folder.read()
    assert {name.split(".")[0] for name in everything} == {
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
    }
    np.testing.assert_array_equal(everything[f"{path}.kernel"], kernel)
