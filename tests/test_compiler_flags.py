"""What is put into XLA_FLAGS, and where."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lorweb_jax.processes import compiler_flags
from lorweb_jax.processes.compiler_flags import set_compiler_flags, set_cpu_flags, step_options


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


@pytest.mark.parametrize(
    "version, started, added", [("0.10.2", {}, True), ("0.10.2", {"cpu": 1}, True), ("0.11.0", {}, False)]
)
def test_flags_of_a_jaxlib_whose_sums_are_wrong_on_cpus(version, started, added, monkeypatch, capsys):
    """Said where they come too late."""
    monkeypatch.setattr(importlib.metadata, "version", {"jaxlib": version}.get)
    monkeypatch.setitem(sys.modules, "jax._src.xla_bridge", SimpleNamespace(_backends=started))
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    set_cpu_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_x=1" + " --xla_cpu_experimental_ynn_fusion_type=dot" * added
    assert ("import lorweb_jax first, or set XLA_FLAGS=--xla_cpu" in capsys.readouterr().out) == bool(started)


def test_options_of_a_step_on_tpus(monkeypatch):
    """For kinds that have a SparseCore and several chips, and never against what a user has set."""

    def mesh(kind, size=4):
        return SimpleNamespace(devices=np.full(size, SimpleNamespace(device_kind=kind)), size=size)

    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    name = "xla_tpu_enable_sparse_core_collective_offload_all_gather"
    assert step_options(mesh("TPU v6 lite")) == {name: True}
    assert all(step_options(mesh(*other)) == {} for other in (("TPU v6 lite", 1), ("TPU v5 lite",), ("cpu",)))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}=false")
    assert step_options(mesh("TPU v6 lite")) == {}


_SUM = """
import sys, jax, numpy as np
import lorweb_jax
def gate(d, x, w, bias, h, c, b):
    return (d * (x @ w + bias + (h * c) @ b)).sum(1)
random = np.random.default_rng(0)
shapes = (1, 136, 128), (1, 136, 640), (640, 128), (128,), (1, 136, 32), (1, 1, 32), (32, 128)
arrays = [random.normal(size=shape) for shape in shapes]
made, true = jax.jit(gate)(*(array.astype(np.float32) for array in arrays)), gate(*arrays)
sys.exit(f"{np.linalg.norm(made - true) / np.linalg.norm(true):.1e} off" if abs(made - true).max() > 1e-2 else 0)
"""


def test_a_sum_over_tokens_of_products_is_right_on_a_cpu(monkeypatch):
    """A gate's gradient, which jaxlib 0.10 gets wrong by a quarter if it is told nothing; true: in float64."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    subprocess.run([sys.executable, "-c", _SUM], check=True)


def test_flags_of_a_training(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "")  # so that it is as it was afterwards
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    flags = "--xla_gpu_memory_limit_slop_factor=118 --xla_gpu_dot_merger_threshold_mb=0"
    assert set_compiler_flags(training=True) == f"{flags} XLA_CLIENT_MEM_FRACTION=0.94"
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.94"
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_enable_triton_gemm=false {flags}"
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # jax ends where it finds both
    assert set_compiler_flags(training=True) == "" and "XLA_CLIENT_MEM_FRACTION" not in os.environ


def test_xla_knows_the_flags():
    """A name that XLA doesn't know would end every program on a GPU."""
    jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=compiler_flags.FOR_TRAINING)
    with pytest.raises(Exception, match="xla_gpu_no_such_flag"):
        jax.jit(lambda x: x + 2).lower(1.0).compile(compiler_options={"xla_gpu_no_such_flag": False})
