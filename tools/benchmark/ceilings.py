"""What the device can do at most, measured: matrix products, also in 8 bit, and copies."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmark.random_weights import normal
from benchmark.setting import Setting
from lorweb_jax.nn.attention import fastest
from lorweb_jax.nn.quantization import DTYPES, multiplies_fp8


def machine(threads: int) -> dict[str, Any]:
    """What the run is on; "memory" is in bytes: the device's, or what this machine has left."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device": _processor() if on_cpu else device.device_kind,
        "memory": stats.get("bytes_limit", 0) or _available(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def best_seconds(function: Callable, *args, budget: float = 0.4) -> float:
    """The shortest time of one call, out of at least 3 and of as many as fit in `budget` seconds."""
    jax.block_until_ready(function(*args))
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(setting: Setting, kinds: Sequence[str] = ()) -> dict[str, Any]:
    """{"matmul": FLOP/s, "matmul_shape", "copy": bytes/s, read and written}, the best of several shapes and tries.

    For each of `kinds` that the hardware multiplies also FLOP/s by its name: "int8" (codes on both sides) and "fp8".
    """
    d, m = setting.model.features, setting.batch * setting.length
    on_cpu = jax.default_backend() == "cpu"
    square = 1536 if on_cpu else 8192
    # The model's own largest products, and a square one that no chip finds awkward.
    shapes = [(m, d, 4 * d), (m, 4 * d, d), (m, 5 * d, d), (square,) * 3]
    rates = {shape: _rate(shape, setting.dtype) for shape in shapes}
    shape = max(rates, key=rates.get)
    # Far larger than any cache.
    source = jnp.ones(2**25 if on_cpu else 2**29, jnp.float32)
    found = {
        "matmul": rates[shape],
        "matmul_shape": "[{0}, {1}] x [{1}, {2}]".format(*shape),
        "copy": 2 * source.nbytes / best_seconds(jax.jit(lambda x: x + 1), source),
    }
    # A CPU's int8 products are left out: XLA makes them one number at a time.
    multiplied = {"int8": not on_cpu, "fp8": multiplies_fp8()}
    return found | {kind: max(_rate(shape, kind) for shape in shapes) for kind in kinds if multiplied.get(kind)}


def _rate(shape: tuple[int, int, int], dtype: str) -> float:
    """FLOP/s of [m, i] x [i, o] in a dtype, "int8" or "fp8"."""
    m, i, o = shape
    out = {"int8": jnp.int32, "fp8": jnp.bfloat16}.get(dtype, dtype)
    factors = [
        normal(seed, axes, "bfloat16" if dtype in DTYPES else dtype, 30.0 if dtype == "int8" else 1.0).astype(
            DTYPES.get(dtype, dtype)
        )
        for seed, axes in ((0, (m, i)), (1, (i, o)))
    ]
    matmul = jax.jit(lambda x, y: jnp.matmul(x, y, preferred_element_type=out))
    return 2 * m * i * o / best_seconds(matmul, *factors)


def attention_seconds(setting: Setting) -> dict[str, float]:
    """Seconds of one block's attention by implementation, the fastest first, with its backward pass for training."""
    model = setting.model
    return fastest(
        (setting.batch, setting.length, model.num_attention_heads, model.attention_head_dim),
        jnp.dtype(setting.dtype),
        backward=setting.what == "train",
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def _available() -> int:
    """Bytes of memory this machine can still give; 0 where that isn't known."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
