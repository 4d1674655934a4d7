"""XLA's compiler for NVIDIA GPUs on a machine without one: jax's CUDA plugin, told what the GPU is.

The plugin needs none of NVIDIA's own packages for it. Kernels aren't timed, as there is nothing to time them on, so the
compiler chooses as its cost model says.
"""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorweb_jax.processes import compiler_flags

# Descriptions by the name of the chip: the H100's as XLA prints it of one, the others' by data sheets.
_DESCRIPTIONS = Path(__file__).parent / "gpus"
INSTALL = "pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0}"  # of jax's version
# The compiler has tables of products' rates for these; of others it says "Cannot find key: sm_80".
_ESTIMATED = ("h100", "h200", "b200")


def described(kind: str) -> bool:
    """Whether it is known what this chip looks like to the compiler."""
    return (_DESCRIPTIONS / f"{kind}.txtpb").exists()


def estimates(kind: str) -> bool:
    """Whether the compiler says how long each instruction of a program for this chip takes."""
    return kind in _ESTIMATED


def installed() -> bool:
    return any(map(importlib.util.find_spec, compiler_flags.PLUGINS))


@functools.cache
def devices(kind: str, count: int) -> list[jax.Device]:
    """GPUs of this kind, in one host, to compile for. cuDNN's attention is traced as if its library were there."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    cudnn.check_cudnn_version = lambda: 91000
    text = (_DESCRIPTIONS / f"{kind}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology=f"1x1x{count}", target_config=text).devices


def compiled(lowered: jax.stages.Lowered, kind: str, count: int) -> Any:
    """XLA's executable, for so many of this chip, of a function that was traced for CPU devices and lowered for
    "cuda"."""
    from jax._src.lib import xla_client

    options = xla_client.CompileOptions()
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, count
    build.device_assignment = xla_client.DeviceAssignment.create(np.arange(count).reshape(1, count))
    build.use_spmd_partitioning = build.use_shardy_partitioner = True
    options.env_option_overrides = [
        *compiler_flags.FOR_TRAINING.items(),
        ("xla_gpu_collect_cost_model_stats", estimates(kind)),
    ]
    gpus = devices(kind, count)
    return gpus[0].client.compile(lowered.compiler_ir(), xla_client.DeviceList(tuple(gpus)), options)
