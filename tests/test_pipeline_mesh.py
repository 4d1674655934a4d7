"""A pipeline on a mesh of eight devices makes the pictures of one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from compare import relative
from jax.sharding import AbstractMesh

from lorweb_jax.common.errors import UserError
from lorweb_jax.edit import parse
from lorweb_jax.nn import sharding
from lorweb_jax.pipeline.devices import as_mesh, tell_undivided


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, np.ndarray]:
    out = tmp_path_factory.mktemp("pictures") / "made.npz"
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
    command = [sys.executable, Path(__file__).with_name("pipeline_mesh_job.py"), out]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags})
    return dict(np.load(out))


def test_pictures_and_mixes_are_those_of_one_device(made):
    """A mix folded; beside the weights, with style guidance, step by step; and adapted by gradients."""
    for mesh, what in (("sequence", "folded"), ("all", "styled")):
        assert np.abs(made[f"{mesh}/{what}"].astype(int) - made[f"one/{what}"]).max() <= 1, what
    assert relative(made["sequence/adapted"], made["one/adapted"]) <= 1e-5
    assert made["all/steps"].tolist() == [0, 1]
    np.testing.assert_array_equal(made["back"], made["one/folded"])


def test_weights_are_whole_along_the_sequence_and_split_along_the_others(made):
    assert [float(made[f"{mesh}/share"]) for mesh in ("one", "sequence", "all")] == [1, 1, 1 / 4]


def test_tokens_are_exchanged_for_heads_and_nothing_else_travels(made):
    """q, k, v and the result of each stream, once a block: of a double block's two, and of a single block's one."""
    assert made["sent"].tolist() == ["all-to-all"] * (2 * 4 + 4)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"heads": 2}, "the mesh is heads=2; give sizes of some of data, fsdp, sequence, tensor"),
        ({"tensor": 0}, "the mesh's tensor is 0; give a whole number from 1"),
        ({"sequence": 2}, "needs 2 devices, but 1 were found; set mesh so that"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused_in_one_sentence(sizes, message):
    with pytest.raises(UserError, match=message) as error:
        as_mesh(sizes, 4)
    assert "\n" not in str(error.value) and error.value.code == 2


def test_the_mesh_of_a_command():
    assert parse(["--mesh", "sequence=4, tensor=-1"]).mesh == {"sequence": 4, "tensor": -1}
    for text in ("4", "sequence", "sequence=two", "tensor=2,tensor=4"):
        with pytest.raises(UserError, match="is no mesh; give one such as sequence=4,tensor=2"):
            parse(["--mesh", text])


def test_what_does_not_divide_is_told_once(capsys):
    mesh = AbstractMesh((2, 1, 4, 1), sharding.AXES)
    tell_undivided(mesh, 2, 128, 20)
    tell_undivided(None, 1, 3, 4)
    assert capsys.readouterr().out == ""
    for _ in range(2):
        tell_undivided(mesh, 1, 98, 20)
    batch, tokens = capsys.readouterr().out.splitlines()
    assert batch.startswith("a batch of 1 does not divide over a data axis of 2 devices")
    assert tokens.startswith("98 tokens do not divide over a sequence axis of 4 devices")


def test_training_refuses_tokens_that_do_not_divide():
    mesh = AbstractMesh((1, 1, 4, 1), sharding.AXES)
    sharding.check_tokens([128, 148], mesh)
    with pytest.raises(UserError, match="150 tokens do not divide over a sequence axis of 4 devices"):
        sharding.check_tokens([128, 150], mesh)
