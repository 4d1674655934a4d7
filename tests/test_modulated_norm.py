"""The TPU's layer norm with modulation, emulated, against the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from compare import relative
from jax.experimental.pallas import tpu as pltpu

from lorweb_jax.nn.modulated_norm import modulated


def formula(x, shift, scale):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None], x


def test_values_and_gradients_are_the_formula():
    """Of two examples in two steps each, with a mean far from zero; and what passes the branch by."""
    random = np.random.default_rng(0)
    x, dy, past = 3 + random.normal(size=(3, 2, 256, 256))
    inputs = (x, *random.normal(size=(2, 2, 256)))
    with jax.enable_x64(True):
        y, transpose = jax.vjp(formula, *map(jnp.asarray, inputs))
        expected = jax.tree.map(np.asarray, (*y, *transpose((jnp.asarray(dy), jnp.asarray(past)))))
    with pltpu.force_tpu_interpret_mode():
        y, transpose = jax.vjp(modulated, *(jnp.asarray(value, jnp.float32) for value in inputs))
        found = *y, *transpose((jnp.asarray(dy, jnp.float32), jnp.asarray(past, jnp.float32)))
    for ours, formulas in zip(found, expected, strict=True):
        assert relative(ours, formulas) <= 1e-6
