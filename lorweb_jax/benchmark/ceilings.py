"""What the device can do at most, measured: matrix products and copies; and which attention is faster on it."""

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lorweb_jax.benchmark.ours import normal
from lorweb_jax.benchmark.setting import Setting


def machine(threads: int) -> dict[str, Any]:
    """What the run is on; "memory" is in bytes: the device's, or what this machine has left."""
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    stats = device.memory_stats() or {}
    return {"platform": device.platform, "device": _processor() if on_cpu else device.device_kind,
            "memory": stats.get("bytes_limit", 0) or _available(), "jax": jax.__version__,
            "python": platform.python_version(), "cores": os.cpu_count(), "threads": threads}


def best_seconds(function: Callable, *args, budget: float = 0.4) -> float:
    """The shortest time of one call, out of at least 3 and of as many as fit in `budget` seconds."""
    jax.block_until_ready(function(*args))
    times, end = [], time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(setting: Setting) -> dict[str, Any]:
    """{"matmul": FLOP/s, "matmul_shape", "copy": bytes/s, read and written}, the best of several shapes and tries."""
    d, m = setting.model.features, setting.batch * (setting.tokens + setting.text_tokens)
    on_cpu = jax.default_backend() == "cpu"
    square = 1536 if on_cpu else 8192
    # The model's own largest products, and a square one that no chip finds awkward.
    shapes = [(m, d, 4 * d), (m, 4 * d, d), (m, 5 * d, d), (square,) * 3]
    matmul = jax.jit(jnp.matmul)
    rates = {}
    for rows, inner, columns in shapes:
        left = normal(0, (rows, inner), setting.dtype)
        right = normal(1, (inner, columns), setting.dtype)
        rates[rows, inner, columns] = 2 * rows * inner * columns / best_seconds(matmul, left, right)
    shape = max(rates, key=rates.get)
    # Far larger than any cache.
    source = jnp.ones(2 ** 25 if on_cpu else 2 ** 29, jnp.float32)
    return {"matmul": rates[shape], "matmul_shape": "[{0}, {1}] x [{1}, {2}]".format(*shape),
            "copy": 2 * source.nbytes / best_seconds(jax.jit(lambda x: x + 1), source)}


def attention_seconds(setting: Setting) -> dict[str, float | str]:
    """Seconds of one block's attention by implementation, with its backward pass for training; or why it failed."""
    if jax.default_backend() != "gpu":
        return {}
    model, length = setting.model, setting.tokens + setting.text_tokens
    shape = (setting.batch, length, model.num_attention_heads, model.attention_head_dim)
    qkv = [normal(seed, shape, setting.dtype) for seed in range(3)]
    found = {}
    for implementation in ("xla", "cudnn"):
        def attend(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, implementation=implementation)

        if setting.what == "train":
            function = jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        else:
            function = attend
        try:
            found[implementation] = best_seconds(jax.jit(function), *qkv)
        # Whatever keeps an implementation from running here: only the other one is left.
        except Exception as error:
            found[implementation] = str(error).strip().splitlines()[0][:200]
    return found


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
