"""Other ways to compute the same step: what the code did before, for the ratio on one device, and what is tried there
before it becomes the code's own.

Each is a set of replacements that hold while a step is traced (`applied`); results equal the code's to rounding.
"""

import contextlib
import functools

import jax.numpy as jnp

from lorweb_jax.models.flux1 import blocks, embeddings
from lorweb_jax.nn import layers

# What is replaced, and every module that has imported it.
_TARGETS = {"rotate": ((blocks, "rotate"),), "sum_of_products": ((layers, "sum_of_products"),)}


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


VARIANTS = {"before": _before}
