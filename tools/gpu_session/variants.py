"""Other ways to compute the same step: what the code did before, for the ratio on one device, and what is tried there
before it becomes the code's own.

Each is a set of replacements that hold while a step is traced (`applied`); results equal the code's to rounding.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import norm_rope
from jax.ad_checkpoint import checkpoint_name

from lorweb_jax.models.flux1 import blocks, embeddings
from lorweb_jax.nn import layers

# What is replaced, and every module that has imported it.
_TARGETS = {
    "rotate": ((blocks, "rotate"),),
    "sum_of_products": ((layers, "sum_of_products"),),
    "normed_heads": ((blocks, "normed_heads"),),
    "checkpoint_name": ((blocks, "checkpoint_name"),),
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


def _joined(x, kernel, product):
    return product(jnp.concatenate(x, axis=-1) if isinstance(x, tuple) else x, kernel)


def _before():
    """Until 27 November 2026: rope by stacking the turned pairs, and [attention | hidden] joined for proj_out."""
    return {"rotate": lambda x, rope: embeddings._rotate_pairs(x, *rope), "sum_of_products": _joined}


def _one_pass():
    """Norm and rope of q and k by a Triton kernel each way."""
    by_xla = blocks.normed_heads

    def normed_heads(parts, norms, rope):
        scales = tuple(norm.scale[...] for norm in norms)
        if not norm_rope.fits(parts, scales[0].shape[0]):
            return by_xla(parts, norms, rope)
        return norm_rope.normed(parts, scales, rope, norms[0].eps)

    return {"normed_heads": normed_heads}


def _gelu_in_product():
    """The MLP's input of gelu kept as integers of the same bits. Of a float that is kept, jax puts a reduce_precision
    between product and gelu, which XLA removes too late to have cuBLASLt write both (its epilogue BIAS_GELU_AUX)."""

    def bits(x, name):
        kept = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
        return jax.lax.bitcast_convert_type(kept, x.dtype)

    as_bits = jax.custom_jvp(bits, nondiff_argnums=(1,))
    as_bits.defjvp(lambda name, x, dx: (bits(*x, name), *dx))

    def named(x, name):
        return as_bits(x, name) if name == layers.HIDDEN and x.dtype == jnp.bfloat16 else checkpoint_name(x, name)

    return {"checkpoint_name": named}


VARIANTS = {"before": _before, "one pass": _one_pass, "gelu in product": _gelu_in_product}
