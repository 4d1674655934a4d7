"""What XLA is told about compiling for the accelerators of this machine, so that users need not."""

import importlib.util
import os

# Products by cuBLASLt alone: Triton's take an activation out of the product, and are autotuned for minutes.
FOR_GPUS = {"xla_gpu_enable_triton_gemm": False}
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def set_compiler_flags() -> str:
    """Add to XLA_FLAGS what isn't there and suits the accelerators whose plugins are installed; to be called before
    jax's backend starts, which reads the variable once. Returns what was added, "" where nothing was."""
    given = os.environ.get("XLA_FLAGS", "")
    if not any(map(importlib.util.find_spec, PLUGINS)):
        return ""
    added = " ".join(f"--{name}={str(value).lower()}" for name, value in FOR_GPUS.items() if name not in given)
    os.environ["XLA_FLAGS"] = f"{given} {added}".strip()
    return added
