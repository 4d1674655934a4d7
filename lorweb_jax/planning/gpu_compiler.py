"""XLA's compiler for NVIDIA GPUs on a machine without one: jax's CUDA plugin, told what the GPU is.

The plugin needs none of NVIDIA's own packages for it. Kernels aren't timed, as there is nothing to time them on, so the
compiler chooses as its cost model says.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax

# Descriptions as XLA prints them of a device; by the name of the chip.
_DESCRIPTIONS = Path(__file__).parent / "gpus"
_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
INSTALL = "pip install --no-deps jax-cuda12-plugin=={0} jax-cuda12-pjrt=={0}"  # of jax's version
# The estimates, and products by cuBLASLt alone: on an H100 no slower than with Triton's, whose estimates are too high.
OPTIONS = {"xla_gpu_collect_cost_model_stats": True, "xla_gpu_enable_triton_gemm": False}


def described(kind: str) -> bool:
    """Whether it is known what this chip looks like to the compiler."""
    return (_DESCRIPTIONS / f"{kind}.txtpb").exists()


def installed() -> bool:
    return any(map(importlib.util.find_spec, _PLUGINS))


def devices(kind: str) -> Sequence[jax.Device]:
    """One GPU of this kind to compile for. cuDNN's attention is traced as if its library were there."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax.experimental import topologies

    cudnn.check_cudnn_version = lambda: 91000
    text = (_DESCRIPTIONS / f"{kind}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=text).devices
