"""Flat states, safetensors files and conversion tables."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.files import state
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import Spec, write, write_sharded, write_stream
from lorweb_jax.files.table import CONV, LINEAR, Layout, Row, Stored, tensors_of
from lorweb_jax.nn.layers import Conv, LayerNorm, Linear, stacked


class Block(nnx.Module):
    def __init__(self, rngs):
        self.left = Linear(4, 4, role="any", rngs=rngs)
        self.right = Linear(4, 6, role="any", rngs=rngs)
        self.norm = LayerNorm(6, rngs=rngs)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.blocks = stacked(Block, 3, rngs)
        self.convs = nnx.List([Conv(2, 5, rngs=rngs)])
        self.last = Linear(6, 8, bias=False, role="any", rngs=rngs)


ROWS = [
    Row("blocks.left.kernel", "layer.{l}.fused.weight", LINEAR),
    Row("blocks.left.bias", "layer.{l}.fused.bias"),
    Row("blocks.right.kernel", "layer.{l}.fused.weight", LINEAR),
    Row("blocks.right.bias", "layer.{l}.fused.bias"),
    ("blocks.norm.scale", "layer.{l}.norm.weight", None),
    ("blocks.norm.bias", "layer.{l}.norm.bias", None),
    Row("convs.0.kernel", "conv.weight", CONV),
    Row("convs.0.bias", "conv.bias"),
    Row("last.kernel", "last.weight", (2, 3, 1, 0), swapped=True),
    Row("absent.kernel", "absent.weight", LINEAR),
]


@pytest.fixture(scope="module")
def model():
    return Model()


def test_flat_state_and_build_are_inverses(model):
    flat = state.flat_state(model)
    assert set(flat) == {row[0] for row in ROWS} - {"absent.kernel"}
    assert flat["blocks.left.kernel"].shape == (3, 4, 4)
    shapes = state.shapes(Model)
    assert {path: (s.shape, s.dtype) for path, s in shapes.items()} == {
        path: (a.shape, a.dtype) for path, a in flat.items()
    }
    values = {path: np.full(a.shape, k, ml_dtypes.bfloat16) for k, (path, a) in enumerate(flat.items())}
    built = state.flat_state(state.build(Model, values))
    for path in values:
        assert built[path].dtype == jnp.bfloat16 and (np.asarray(built[path]) == values[path]).all()


def test_build_lists_what_differs(model):
    flat = state.flat_state(model)
    flat["stray"] = flat.pop("last.kernel")
    flat["convs.0.bias"] = jnp.zeros(7)
    with pytest.raises(
        UserError,
        match=r"3 places(.|\n)*− last.kernel \[6, 8\](.|\n)*\+ stray(.|\n)*"
        r"± convs.0.bias: found \[7\], expected \[5\]",
    ):
        state.build(Model, flat)


def test_table_is_its_own_inverse_and_lies_as_said(model, tmp_path):
    flat = {
        path: np.asarray(jax.random.normal(jax.random.key(k), a.shape))
        for k, (path, a) in enumerate(state.flat_state(model).items())
    }
    specs, produce = tensors_of(flat, ROWS)
    write_stream(tmp_path / "model.safetensors", specs, produce)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    fused = theirs["layer.1.fused.weight"]
    assert fused.shape == (10, 4)
    np.testing.assert_array_equal(fused[:4], flat["blocks.left.kernel"][1].T)
    np.testing.assert_array_equal(fused[4:], flat["blocks.right.kernel"][1].T)
    np.testing.assert_array_equal(theirs["conv.weight"][4, 1], flat["convs.0.kernel"][:, :, 1, 4])
    assert theirs["last.weight"].shape == (8, 6, 1, 1)
    np.testing.assert_array_equal(theirs["last.weight"][0, :, 0, 0], flat["last.kernel"][:, 4])
    back = Stored(Checkpoint(tmp_path), ROWS, state.shapes(Model)).load()
    assert set(back) == set(flat)
    for path in flat:
        np.testing.assert_array_equal(back[path], flat[path])


def test_table_is_strict(model, tmp_path):
    specs, produce = tensors_of(state.flat_state(model), ROWS)
    wrong = {key: spec for key, spec in specs.items() if key != "conv.bias"} | {"extra": Spec((2,), np.float32)}
    write_stream(
        tmp_path / "m.safetensors", wrong, lambda key: np.zeros(2, np.float32) if key == "extra" else produce(key)
    )
    with pytest.raises(UserError, match=r"− conv.bias \[5\]: missing\n  \+ extra \[2\]"):
        Stored(Checkpoint(tmp_path), ROWS, state.shapes(Model)).load()
    with pytest.raises(UserError, match="no row for blocks.norm.bias"):
        Layout([row for row in ROWS if row[0] != "blocks.norm.bias"], state.shapes(Model))


def arrays(rng):
    return {
        "w": rng.normal(size=(7, 3)).astype(np.float32),
        "h": rng.normal(size=(5,)).astype(np.float16),
        "b": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16),
        "i": np.arange(4),
        "s": np.array(3, np.float32),
        "u": np.arange(3, dtype=np.uint8),
        "e": np.zeros((0, 2), np.float32),
    }


def test_files_are_those_of_the_safetensors_package(tmp_path):
    held = arrays(np.random.default_rng(0))
    write(tmp_path / "ours.safetensors", held, {"format": "pt"})
    safetensors.numpy.save_file(held, tmp_path / "theirs.safetensors", {"format": "pt"})
    read = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    for file in ("ours", "theirs"):
        checkpoint = Checkpoint(tmp_path / f"{file}.safetensors")
        assert checkpoint.metadata == {"format": "pt"}
        for name, array in held.items():
            assert checkpoint.dtype(name) == array.dtype == read[name].dtype
            assert checkpoint.read(name).tobytes() == array.tobytes() == read[name].tobytes()
    np.testing.assert_array_equal(checkpoint.read("w", 2, 5), held["w"][2:5])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["ours.safetensors", "theirs.safetensors"]


def test_shards_and_index(tmp_path):
    held = {f"t{k}": np.full((10, 10), k, np.float32) for k in range(5)}
    specs = {name: Spec(array.shape, array.dtype) for name, array in held.items()}
    files = write_sharded(tmp_path, "model", specs, held.__getitem__, max_shard_bytes=900)
    assert [file.name for file in files] == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000 and set(index["weight_map"]) == set(held)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint) == 5 and checkpoint.nbytes == 2000
    assert all((checkpoint.read(name) == array).all() for name, array in held.items())
    files[1].unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors does not exist"):
        Checkpoint(tmp_path)


def test_bad_files_are_one_sentence(tmp_path):
    good = tmp_path / "good.safetensors"
    write(good, arrays(np.random.default_rng(0)))
    whole = good.read_bytes()
    cases = {
        "cut": (whole[:-3], "cut short: .* expected"),
        "headless": (whole[:40], "cut short within its header"),
        "empty": (b"", "not a safetensors file"),
        "zip": (b"PK\x03\x04" + bytes(200), "not a safetensors file"),
        "text": (b"version https://git-lfs.github.com/spec/v1\n" * 5, "not a safetensors file"),
        "json": ((2).to_bytes(8, "little") + b"[]", "not a safetensors file"),
        "sizes": (whole.replace(b'"shape":[7,3]', b'"shape":[7,4]'), "does not agree with its shape"),
    }
    for name, (content, message) in cases.items():
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Checkpoint(file)
    with pytest.raises(UserError, match="does not exist"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match="expected one .safetensors file"):
        Checkpoint(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no .safetensors file"):
        Checkpoint(tmp_path / "none")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.safetensors"
    write(path, {"w": np.ones(3, np.float32)})

    def fail(name):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        write_stream(path, {"w": Spec((3,), np.float32)}, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]
    assert (Checkpoint(path).read("w") == 1).all()
    with pytest.raises(UserError, match="GB free"):
        write_stream(tmp_path / "huge", {"w": Spec((1 << 50,), np.float32)}, fail)
