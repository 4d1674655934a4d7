"""jax's Hopper attention kernel (Pallas, Mosaic GPU), made to take bfloat16, against cuDNN's."""

import functools
import inspect
import re
import sys
import types

import jax
import jax.numpy as jnp
from results import say

from benchmark import ceilings
from benchmark.random_weights import normal
from lorweb_jax.nn.attention import attend


@functools.cache
def module():
    """jax's module with scratch memory in bfloat16, which it has in float16 whatever the inputs are."""
    import jax.experimental.pallas.ops.gpu.attention_mgpu as original

    source = re.sub(r"(?<!\[)jnp\.float16(?!, jnp)", "jnp.bfloat16", inspect.getsource(original))
    sys.modules["attention_bf16"] = copy = types.ModuleType("attention_bf16")
    exec(compile(source, "attention_bf16", "exec"), copy.__dict__)
    return copy


def attend_by(q, k, v, *, block_q=64, block_kv=128, steps=2, backward=None):
    """attention.attend by the kernel; backward: (block_q_dkv, block_kv_dkv, block_q_dq, block_kv_dq)."""
    names = ("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    config = module().TuningConfig(
        block_q=block_q, block_kv=block_kv, max_concurrent_steps=steps, **dict(zip(names, backward or ()))
    )
    return module().attention(q * q.shape[-1] ** -0.5, k, v, config)


def measure_attention(results, settings):
    """Rates of both, forward, and forward and backward; the largest difference beside cuDNN's largest result."""
    choices = {
        f"mosaic {q}x{kv}, {n} steps": {"block_q": q, "block_kv": kv, "steps": n}
        for q, kv, n in ((64, 128, 2), (128, 128, 2), (64, 64, 4), (128, 64, 2), (64, 256, 2))
    }
    backward = {
        f"mosaic backward {blocks}": {"backward": blocks}
        for blocks in ((64, 64, 64, 64), (64, 128, 64, 128), (128, 64, 128, 64))
    }
    for name, setting in settings.items():
        shape = (setting.batch, setting.length, setting.model.num_attention_heads, setting.model.attention_head_dim)
        q, k, v = (normal(seed, shape, setting.dtype) for seed in range(3))
        ways = {"cuDNN": lambda q, k, v: attend(q, k, v, "cudnn")}
        ways |= {key: functools.partial(attend_by, **value) for key, value in choices.items()}
        expected = ways["cuDNN"](q, k, v)
        for passes, flops in (("forward", 4), ("forward + backward", 14)):
            if passes != "forward":
                ways = {"cuDNN": ways["cuDNN"]}
                ways |= {key: functools.partial(attend_by, **value) for key, value in backward.items()}
            for key, way in ways.items():
                try:
                    run = jax.jit(way if passes == "forward" else lambda q, k, v, way=way: jax.vjp(way, q, k, v)[1](v))
                    seconds = ceilings.best_seconds(run, q, k, v)
                    error = jnp.abs(run(q, k, v).astype(jnp.float32) - expected).max() if passes == "forward" else 0
                    rate = flops * setting.batch * setting.length**2 * setting.model.features / seconds / 1e12
                    row = {"ms": round(1e3 * seconds, 3), "TFLOP/s": round(rate, 1), "error": float(error)}
                    results.put("attention", f"{name} {passes} {key}", row)
                except Exception as problem:
                    results.failed(f"attention {name} {key}", problem)
    say("attention measured")
