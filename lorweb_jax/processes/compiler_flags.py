"""What jax and XLA are told about the devices of this machine, so that users need not."""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

from lorweb_jax.common.errors import say

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Products by cuBLASLt alone, which makes their activations too, as Triton's don't.
FOR_GPUS = {"xla_gpu_enable_triton_gemm": False}
# In training also: what a step keeps is chosen (remat) so that it fits; XLA, which would like a twentieth of the memory
# free, must not recompute more. Nor must it join products of one operand, such as the gradients of A by the parts of an
# input: it copies the parts together first.
FOR_TRAINING = FOR_GPUS | {"xla_gpu_memory_limit_slop_factor": 118, "xla_gpu_dot_merger_threshold_mb": 0}
# On CPUs jaxlib 0.10 fuses sums over rows with the products that make them (YNNPACK), and for some shapes gets them
# wrong by up to a third: such as the gradient of a gate, for one example of 100 to 272 tokens. Products alone are
# right, and so is jaxlib 0.11.
FOR_CPUS, FAULTY = {"xla_cpu_experimental_ynn_fusion_type": "dot"}, "0.10."
MEMORY_SHARE = 0.94  # of a GPU, for a training process; jax takes 0.75 if it is told nothing
_SHARE, _FORMER = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax refuses both at once


# Of a training step, by the kind of TPU. libtpu gathers weights while nothing else runs (docs/performance.md); the
# SparseCore that these chips have can do it meanwhile.
FOR_TPUS = {
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), {"xla_tpu_enable_sparse_core_collective_offload_all_gather": True}),
    **dict.fromkeys(
        ("TPU v5", "TPU v5p"),
        {
            "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
        },
    ),
}


def step_options(mesh: Any) -> dict[str, bool]:
    """What the compiler of a training step on a jax.sharding.Mesh is told, but for what LIBTPU_INIT_ARGS says."""
    known = FOR_TPUS.get(mesh.devices.flat[0].device_kind, {}) if mesh.size > 1 else {}
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    return {name: value for name, value in known.items() if name not in given}


def set_cpu_flags() -> None:
    """Put into the environment what CPUs need for right results; the package does it as it is imported. Where jax's
    backend has started by then, which reads the environment once, a sentence says so."""
    if not importlib.metadata.version("jaxlib").startswith(FAULTY) or not (added := _add(FOR_CPUS)):
        return
    if getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", None):
        say(
            f"jax had started before lorweb_jax was imported, and on a CPU this version of it gets some sums wrong; "
            f"import lorweb_jax first, or set XLA_FLAGS={added}"
        )


def _add(flags: Mapping[str, object]) -> str:
    """What of these was added to XLA_FLAGS, which said nothing of it."""
    given = os.environ.get("XLA_FLAGS", "")
    added = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items() if name not in given)
    if added:
        os.environ["XLA_FLAGS"] = f"{given} {added}".strip()
    return added


def set_compiler_flags(training: bool = False) -> str:
    """Put into the environment what suits the accelerators whose plugins are installed, where it says nothing of it;
    to be called before jax's backend starts, which reads it once: later calls change nothing. Returns what was set, ""
    where nothing was."""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        return ""
    added = _add(FOR_TRAINING if training else FOR_GPUS)
    if training and not {_SHARE, _FORMER} & os.environ.keys():
        os.environ[_SHARE] = str(MEMORY_SHARE)
        added = f"{added} {_SHARE}={MEMORY_SHARE}".strip()
    return added
