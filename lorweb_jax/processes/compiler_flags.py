"""What jax and XLA are told about the accelerators of this machine, so that users need not."""

import importlib.util
import os

PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Products by cuBLASLt alone, which makes their activations too, as Triton's don't.
FOR_GPUS = {"xla_gpu_enable_triton_gemm": False}
# In training also: what a step keeps is chosen (remat) so that it fits; XLA, which would like a twentieth of the memory
# free, must not recompute more.
FOR_TRAINING = FOR_GPUS | {"xla_gpu_memory_limit_slop_factor": 118}
MEMORY_SHARE = 0.94  # of a GPU, for a training process; jax takes 0.75 if it is told nothing
_SHARE, _FORMER = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"  # jax refuses both at once


def set_compiler_flags(training: bool = False) -> str:
    """Put into the environment what suits the accelerators whose plugins are installed, where it says nothing of it;
    to be called before jax's backend starts, which reads it once: later calls change nothing. Returns what was set, ""
    where nothing was."""
    if not any(map(importlib.util.find_spec, PLUGINS)):
        return ""
    given = os.environ.get("XLA_FLAGS", "")
    flags = FOR_TRAINING if training else FOR_GPUS
    added = " ".join(f"--{name}={str(value).lower()}" for name, value in flags.items() if name not in given)
    os.environ["XLA_FLAGS"] = f"{given} {added}".strip()
    if training and not {_SHARE, _FORMER} & os.environ.keys():
        os.environ[_SHARE] = str(MEMORY_SHARE)
        added = f"{added} {_SHARE}={MEMORY_SHARE}".strip()
    return added
