"""What is put into XLA_FLAGS, and where."""

import importlib.util
import os

import jax
import pytest

from lorweb_jax.processes import compiler_flags
from lorweb_jax.processes.compiler_flags import set_compiler_flags


@pytest.mark.parametrize(
    "plugins, given, expected",
    [
        ((), "--xla_x=1", ("", "--xla_x=1")),
        (("jax_cuda12_plugin",), "", ("--xla_gpu_enable_triton_gemm=false",) * 2),
        (
            ("jax_cuda13_plugin",),
            "--xla_x=1",
            ("--xla_gpu_enable_triton_gemm=false", "--xla_x=1 --xla_gpu_enable_triton_gemm=false"),
        ),
        (("jax_cuda12_plugin",), "--xla_gpu_enable_triton_gemm=true", ("", "--xla_gpu_enable_triton_gemm=true")),
    ],
)
def test_flags(plugins, given, expected, monkeypatch):
    """Where there is a GPU's plugin, and never against what a user has set."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in plugins or None)
    monkeypatch.setenv("XLA_FLAGS", given)
    assert (set_compiler_flags(), os.environ["XLA_FLAGS"]) == expected


def test_flags_of_a_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # so that it is as it was afterwards
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    said = "--xla_gpu_memory_limit_slop_factor=118 XLA_CLIENT_MEM_FRACTION=0.94"
    assert set_compiler_flags(training=True) == said and os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.94"
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false --xla_gpu_memory_limit_slop_factor=118"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # jax ends where it finds both
    assert set_compiler_flags(training=True) == "" and "XLA_CLIENT_MEM_FRACTION" not in os.environ


def test_xla_knows_the_flags():
    """A name that XLA doesn't know would end every program on a GPU."""
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=compiler_flags.FOR_TRAINING)
    with pytest.raises(Exception, match="xla_gpu_no_such_flag"):
        jax.jit(lambda x: x + 2).lower(1.0).compile(compiler_options={"xla_gpu_no_such_flag": False})
