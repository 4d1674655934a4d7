"""Meshes of eight devices train as one device does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import relative

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding

TOLERANCE = 1e-5  # relative, L2
PAIR = [("pair", 1, 1, 1, 1), ("blocks", 2, 2, 1, 2)]  # of Pair Customization; the second with blocks of their own
OFFLOADED = ("offload", 2, 2, 1, 2)  # with blocks in the host's memory
# Axes alone, and two or three of them; by data, fsdp, sequence, tensor.
MESHES = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (1, 4, 1, 2), (4, 1, 2, 1), (1, 2, 2, 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[tuple[int, int, int, int], dict[str, np.ndarray]]:
    out = tmp_path_factory.mktemp("meshes")
    names = [",".join(map(str, sizes)) for sizes in [(1, 1, 1, 1), *MESHES, *PAIR, OFFLOADED]]
    subprocess.run(
        [sys.executable, Path(__file__).with_name("mesh_job.py"), out, *names],
        check=True,
        # The older emitters of loops compile in half the time.
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"},
    )
    return {tuple(map(_number, name.split(","))): dict(np.load(out / f"{name}.npz")) for name in names}


def _number(word: str) -> int | str:
    return int(word) if word.isdigit() else word


@pytest.mark.parametrize("sizes", [*MESHES, OFFLOADED], ids=str)
def test_a_mesh_of_eight_devices_trains_as_one_device(runs, sizes):
    one, many = runs[1, 1, 1, 1], runs[sizes]
    for name in (name for name in one if not name.startswith("share/")):
        assert relative(many[name], one[name]) <= TOLERANCE, name


def test_a_pair_trains_on_eight_devices_as_on_one(runs):
    """Both passes, and their trained and frozen parts, which are split along fsdp."""
    one, many = (runs[sizes] for sizes in PAIR)
    for name in (name for name in one if not name.startswith("share/")):
        assert relative(many[name], one[name]) <= TOLERANCE, name
    shares = {name: share for name, share in many.items() if name.startswith("share/basis.")}
    assert shares and {float(share) for share in shares.values()} == {1 / 2}
    assert many["share/transformer.single_transformer_blocks.blocks.1.proj_out.kernel"] == 1 / 4


def test_weights_and_basis_are_really_split(runs):
    """A device's share of the numbers: all linear layers along fsdp and tensor, the basis along its members."""
    whole, split = runs[8, 1, 1, 1], runs[1, 4, 1, 2]
    for path in (
        "transformer.transformer_blocks.ff.net_0_proj.kernel",
        "transformer.single_transformer_blocks.proj_out.kernel",
        "transformer.transformer_blocks.norm1.linear.kernel",
        "basis.layers.transformer_blocks.attn.to_q.a",
        "basis.layers.transformer_blocks.attn.to_q.b",
    ):
        assert whole[f"share/{path}"] == 1 and split[f"share/{path}"] == 1 / 8, path


def mesh_of(**sizes):
    return sharding.make_mesh(sizes)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"fsdp": 2}, "needs 2 devices, but 1 were found"),
        ({"tensor": 0}, "sizes of at least 1"),
        ({"data": -1, "fsdp": -1}, "one of them -1 at most"),
        ({"fsdp": -1, "data": 3}, "needs 3 devices"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused_in_one_sentence(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        mesh_of(**sizes)
    assert "\n" not in str(error.value) and error.value.code == 2
