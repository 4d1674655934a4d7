"""What is computed one image after the other."""

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.nn.layers import in_turn


def test_each_begins_when_the_one_before_is_done():
    """The same results as at once; each call but the first takes its input from a barrier behind the last result."""
    images = [jnp.arange(4.0) + i for i in range(3)]

    def squares(*images):
        return in_turn(lambda x: (x * x, x + 1), images)

    for found, x in zip(jax.jit(squares)(*images), images, strict=True):
        np.testing.assert_array_equal(found[0], x * x)
        np.testing.assert_array_equal(found[1], x + 1)
    kinds = [equation.primitive.name for equation in jax.make_jaxpr(squares)(*images).eqns]
    assert kinds == ["mul", "add", "optimization_barrier", "mul", "add", "optimization_barrier", "mul", "add"]
