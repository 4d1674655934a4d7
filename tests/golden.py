"""Where the golden data is: inputs and outputs of the published implementations (tests/golden/README.md)."""

import functools
import hashlib
import json
import lzma
import os
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "golden"
# The inputs of a recorded transformer, as diffusers names them.
INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance", "img_ids", "txt_ids")
# sha256 of the recorded basis_a_fp16.safetensors
HALF = "9ed153e0d8f8fbb00cf72605d9534accf0cfcf7cf830d4f78d4aa61b7fbc8637"


@functools.cache
def golden_dir() -> Path:
    """The folder of the golden data, complete."""
    for packed in GOLDEN.glob("*.xz"):
        if not packed.with_suffix("").is_file():
            _write(packed.stem, lzma.decompress(packed.read_bytes()))
    if not (GOLDEN / "basis_a_fp16.safetensors").is_file():
        _write_half()
    return GOLDEN


def _write_half() -> None:
    """Make the recorded basis_a_fp16.safetensors, byte by byte: basis_a's numbers in float16 behind its own header,
    which alone is kept in the repository."""
    header = (GOLDEN / "basis_a_fp16.header").read_bytes()
    places = {key: value["data_offsets"] for key, value in json.loads(header[8:]).items() if key != "__metadata__"}
    arrays = load_file(GOLDEN / "basis_a.safetensors")
    half = header + b"".join(arrays[key].astype(np.float16).tobytes() for key in sorted(places, key=places.get))
    assert hashlib.sha256(half).hexdigest() == HALF
    _write("basis_a_fp16.safetensors", half)


def _write(name: str, data: bytes) -> None:
    new = GOLDEN / f".{name}.{os.getpid()}"
    new.write_bytes(data)
    new.rename(GOLDEN / name)  # other processes of the tests may be making it, too
