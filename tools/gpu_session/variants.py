"""Other ways to compute the same step: what the code did before, for the ratio on one device, and what is tried there
before it becomes the code's own.

Each is a set of replacements that hold while a step is traced (`applied`); results equal the code's to rounding, but
for "fp8-tensor".
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lorweb_jax.adapters import mixture
from lorweb_jax.models.flux1 import blocks, embeddings
from lorweb_jax.nn import layers

# What is replaced, and every module that has imported it.
_TARGETS = {
    "rotate": ((blocks, "rotate"),),
    "attend": ((blocks, "attend"),),
    "product": ((layers, "product"),),
    "sum_of_products": ((layers, "sum_of_products"), (mixture, "sum_of_products")),
}


@contextlib.contextmanager
def applied(names):
    """The named variants in the code's place while the body runs."""
    replacements = functools.reduce(lambda all_, name: all_ | VARIANTS[name](), names, {})
    targets = [(target, value) for key, value in replacements.items() for target in _TARGETS[key]]
    before = [(target, getattr(*target)) for target, _ in targets]
    try:
        for target, value in targets:
            setattr(*target, value)
        yield
    finally:
        for target, value in before:
            setattr(*target, value)


def _joined(x, kernel, product, axis=0):
    return product(jnp.concatenate(x, axis=-1) if isinstance(x, tuple) else x, kernel)


def _before():
    """Until 27 November 2026: rope by stacking the turned pairs, and [attention | hidden] joined for proj_out."""
    return {"rotate": lambda x, rope: embeddings._rotate_pairs(x, *rope), "sum_of_products": _joined}


def _named_qkv():
    attend = blocks.attend

    def named(q, k, v, implementation):
        return attend(*(checkpoint_name(x, "qkv") for x in (q, k, v)), implementation)

    return {"attend": named}


def _fp8_per_tensor():
    """Products as cuBLASLt makes them in e4m3: codes [o, i], one scale a kernel, a constant one for the input."""

    def product(x, codes_oi, scale):
        step = jnp.asarray(0.02, x.dtype)
        rounded = (jnp.clip(x / step, -448, 448)).astype(jnp.float8_e4m3fn)
        kernel = codes_oi.astype(x.dtype) * scale.reshape(()).astype(x.dtype)
        return jax.lax.dot_general(rounded.astype(x.dtype) * step, kernel, (((x.ndim - 1,), (1,)), ((), ())))

    return {"product": product, "sum_of_products": _joined}


VARIANTS = {"before": _before, "qkv": _named_qkv, "fp8-tensor": _fp8_per_tensor}
# Beside layers.REMAT_POLICIES.
POLICIES = {"outputs+qkv": layers._policy(layers.SAVED, layers.OUTPUTS, "qkv")}
