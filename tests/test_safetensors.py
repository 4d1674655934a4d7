"""The safetensors reader beside the reference package: what that refuses is refused, what it reads is read equally."""

import json
import os
import shutil
import socket
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorweb_jax.adapters.basis import LayerShape
from lorweb_jax.adapters.formats.basis_file import config_from_network, read_network
from lorweb_jax.common.errors import UserError
from lorweb_jax.files.checkpoint import Checkpoint, read_all
from lorweb_jax.files.safetensors_io import DTYPES, write
from lorweb_jax.pipeline.adapters import load_basis

BAD = Path(__file__).parent / "files_that_lie"
BYTES = bytes(range(16))


def entry(shape, offsets, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def file_of(header, data=BYTES):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def text_of(fields):
    return ('{"a":{' + fields + "}}").encode()


GOOD = {
    "one tensor": file_of({"a": entry([4], [0, 16])}),
    "unsorted": file_of({"b": entry([2], [8, 16]), "a": entry([2], [0, 8])}),
    "a scalar, an empty tensor": file_of(
        {"e": entry([0, 3], [4, 4]), "s": entry([], [0, 4]), "a": entry([3], [4, 16])}
    ),
    "no tensors": file_of({}, b""),
    "metadata": file_of({"__metadata__": {"format": "pt", "é": "ü"}, "a": entry([4], [0, 16])}),
    "no metadata": file_of({"__metadata__": None, "a": entry([4], [0, 16])}),
    "padded, another field": file_of(json.dumps({"": entry([4], [0, 16], note=[-1, 2.5])}).encode() + b"  \n\t"),
    **{dtype: file_of({"a": entry([16 // DTYPES[dtype].itemsize], [0, 16], dtype)}, b"\1" * 16) for dtype in DTYPES},
}

REFUSED = {
    "nothing": b"",
    "seven bytes": b"\1" * 7,
    "length alone": struct.pack("<Q", 2),
    "length of gigabytes": struct.pack("<Q", 1 << 36) + b"{}      ",
    "largest length": b"\xff" * 8 + b"{}",
    "length past the limit": struct.pack("<Q", 100_000_001) + b"{}",
    "empty header": file_of(b"", b""),
    "not JSON": file_of(b"{a}"),
    "two values": file_of(b"{}{}", b""),
    "a list": file_of(b"[]", b""),
    "a number": file_of(b"1", b""),
    "byte order mark": file_of(b"\xef\xbb\xbf{}", b""),
    "not UTF-8": file_of(b'{"\xff":1}'),
    "half a surrogate pair": file_of(b'{"\\ud800":' + text_of("")[5:-1] + b"}"),
    "NaN": file_of(text_of('"x":NaN,"dtype":"F32","shape":[4],"data_offsets":[0,16]')),
    "infinite": file_of(text_of('"x":1e999,"dtype":"F32","shape":[4],"data_offsets":[0,16]')),
    "deep": file_of(text_of('"x":' + "[" * 100_000 + '"dtype":"F32"')),
    "field twice": file_of(text_of('"dtype":"F32","dtype":"F32","shape":[4],"data_offsets":[0,16]')),
    "metadata twice": file_of(b'{"__metadata__":{},"__metadata__":{}}', b""),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}}, b""),
    "metadata a list": file_of({"__metadata__": []}, b""),
    "metadata a text": file_of({"__metadata__": "x"}, b""),
    "trailing bytes": file_of({"a": entry([4], [0, 16])}, BYTES + b"x"),
    "only trailing bytes": file_of({}, b"x"),
    "cut short": file_of({"a": entry([4], [0, 16])}, BYTES[:-1]),
    "gap before": file_of({"a": entry([3], [4, 16])}),
    "overlap": file_of({"a": entry([4], [0, 16]), "b": entry([1], [0, 4])}),
    "gap": file_of({"a": entry([1], [0, 4]), "b": entry([2], [8, 16])}),
    "empty tensor within another": file_of({"e": entry([0], [8, 8]), "a": entry([4], [0, 16])}),
    "offsets swapped": file_of({"a": entry([4], [16, 0])}),
    "negative offset": file_of({"a": entry([4], [-16, 0])}),
    "negative zero": file_of(text_of('"dtype":"F32","shape":[4],"data_offsets":[-0,16]')),
    "three offsets": file_of({"a": entry([4], [0, 16, 16])}),
    "offsets null": file_of({"a": entry([4], None)}),
    "offsets huge": file_of({"a": entry([4], [0, 10**30])}),
    "offsets true": file_of({"a": entry([1], [0, True], "U8")}, b"x"),
    "wrong size": file_of({"a": entry([5], [0, 16])}),
    "float size": file_of({"a": entry([4.0], [0, 16])}),
    "true for 1": file_of({"a": entry([True, 4], [0, 16])}),
    "negative sizes": file_of({"a": entry([-2, -2], [0, 16])}),
    "size a text": file_of({"a": entry(["4"], [0, 16])}),
    "shape a number": file_of({"a": entry(4, [0, 16])}),
    "shape a text": file_of({"a": entry("4", [0, 16])}),
    "shape null": file_of({"a": entry(None, [0, 16])}),
    "product overflows": file_of({"a": entry([2**32, 2**32, 4], [0, 16])}),
    "product overflows to 16": file_of({"a": entry([2**62 + 4], [0, 16])}),
    "product overflows before a 0": file_of({"e": entry([2**63, 4, 0], [0, 0]), "a": entry([4], [0, 16])}),
    "dtype unknown": file_of({"a": entry([4], [0, 16], "F33")}),
    "dtype null": file_of({"a": entry([4], [0, 16], None)}),
    "dtype a list": file_of({"a": entry([4], [0, 16], ["F32"])}),
    "no dtype": file_of({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "entry null": file_of({"a": None}),
    "entry a number": file_of({"a": 1}),
    "entry empty": file_of({"a": {}}),
    "half a byte": file_of({"a": entry([31], [0, 16], "F4")}),
    **{
        f"case {name}": (BAD / f"{name}.safetensors").read_bytes()
        for name in ("uncovered", "flipped_length", "bool_shape")
    },
}


def reference(content):
    try:
        return {
            name: (array["dtype"], tuple(array["shape"]), bytes(array["data"]))
            for name, array in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        return None


def names(path):
    checkpoint = Checkpoint(path)
    written = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: (written[checkpoint.dtype(name)], checkpoint.shapes[name], checkpoint.read(name).tobytes())
        for name in checkpoint
    }


@pytest.mark.parametrize("name", GOOD)
def test_what_the_reference_reads_is_read_equally(name, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(GOOD[name])
    assert reference(GOOD[name]) == names(tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert (file.metadata() or {}) == Checkpoint(tmp_path / "a.safetensors").metadata


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_reference_refuses_is_refused(name, tmp_path):
    assert reference(REFUSED[name]) is None
    (tmp_path / "a.safetensors").write_bytes(REFUSED[name])
    with pytest.raises(UserError, match="a.safetensors"):
        Checkpoint(tmp_path / "a.safetensors")


def test_a_dtype_that_is_not_known_here_is_named(tmp_path):
    for name, dtype in (("f4", r"F4 \(MXFP4, NVFP4\)"), ("e8m0", r"F8_E8M0 \(scales of MXFP4")):
        with pytest.raises(UserError, match=f"holds numbers of type {dtype}.* not known here; known are F64, F32"):
            Checkpoint(BAD / f"{name}.safetensors")


def test_a_tensor_that_stands_twice_is_refused_where_the_reference_takes_the_last(tmp_path):
    one = '"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    (tmp_path / "a.safetensors").write_bytes(file_of(f"{{{one},{one}}}".encode()))
    with pytest.raises(UserError, match='"a" stands twice'):
        Checkpoint(tmp_path / "a.safetensors")


def test_sizes_that_no_array_has_are_refused(tmp_path):
    for shape in ([0, 2**63 - 1], [1] * 70 + [0]):
        (tmp_path / "a.safetensors").write_bytes(file_of({"a": entry(shape, [0, 0])}, b""))
        with pytest.raises(UserError, match="has the shape"):
            read_all(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "a\0b", "..\\b"]
)
def test_an_index_names_only_files_of_its_folder(name, tmp_path):
    write(tmp_path / "outside.safetensors", {"secret": np.ones(2, np.float32)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
    with pytest.raises(UserError, match="does not lie in its folder"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 100_000,
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": NaN}',
        "\xff",
    ],
)
def test_a_damaged_index_is_one_sentence(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="model.safetensors.index.json"):
        Checkpoint(tmp_path)


def test_pipes_devices_sockets_and_folders_are_refused_without_opening(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("/dev/zero")
    (tmp_path / "folder.safetensors" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.safetensors"))
        for name, kind in (
            ("pipe", "a named pipe"),
            ("link", "a device"),
            ("socket", "a socket"),
            ("folder", "a folder"),
            ("loop", "Too many levels of symbolic links"),
        ):
            with pytest.raises(UserError, match=kind):
                Checkpoint(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="can't be the name of a file"):
        Checkpoint("a\0b.safetensors")


def test_numbers_are_those_of_the_reference(tmp_path):
    arrays = {"half": np.arange(6, dtype=np.float16).reshape(2, 3), "whole": np.arange(3, dtype=np.uint32)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    found, _ = read_all(tmp_path / "a.safetensors")
    assert all((found[name] == array).all() and found[name].dtype == array.dtype for name, array in arrays.items())
    write(tmp_path / "b.safetensors", {"b": np.ones(3, ml_dtypes.bfloat16), "c": np.ones((2, 2), np.uint16)})
    assert reference((tmp_path / "b.safetensors").read_bytes())["c"][:2] == ("U16", (2, 2))


def test_reported_inputs(tmp_path):
    shutil.copy(BAD / "outside.safetensors.index.json", tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError, match="'../../outside.safetensors', which does not lie in its folder"):
        Checkpoint(tmp_path)
    arrays = {
        "transformer_blocks.attn.to_q": {
            "a": np.zeros((1, 8, 4, 4)),
            "b": np.zeros((1, 8, 4, 4)),
            "keys": np.zeros((1, 8, 16)),
            "projection": np.zeros((1, 16, 72)),
        }
    }
    with pytest.raises(UserError, match='lora_heads is "x", expected a whole number'):
        config_from_network(read_network(BAD / "heads_is_text.yaml"), arrays)
    # alpha [1] of two ranks, all A and B ones: 1/2 · (1 + 1).
    layer = "single_transformer_blocks.attn.to_v"
    _, found = load_basis(BAD / "alpha_shape_1.safetensors", {layer: LayerShape(3, 128, 128)})
    assert (found[layer]["a"][0, 0] @ found[layer]["b"][0, 0] == 1).all() and not found[layer]["b"][1:].any()
