"""A fresh model's arrays: bit for bit those of one jitted program, from one program a kind of array."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorweb_jax.training import fresh

TABLE = np.arange(300.0, dtype=np.float32)


def make():
    rngs = nnx.Rngs(jax.random.key(5))

    def uniform(shape, bound):
        return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)

    unused = uniform((1000, 1000), 1.0)  # of a part that isn't wanted; its draw counts
    made = {
        "c": uniform((40, 8), 0.1),
        "a": uniform((40, 8), 0.1),
        "b": uniform((40, 8), 0.2),
        "normal": 0.3 * jax.random.normal(rngs.params(), (70, 3)).astype(jnp.bfloat16),
        "zeros": jnp.zeros((80,)),
        "zeros too": jnp.zeros((80,)),
        "small": uniform((4, 4), 0.5),
        "bias": jnp.full((128,), 0.1).at[64:].set(-5.0),
        "table": jnp.asarray(TABLE) * 2,
        "number": jnp.log(3.0),
    }
    made["scaled"] = made["a"] * 0.1
    made["split"] = jax.random.truncated_normal(jax.random.split(rngs.params(), 3)[1], -2, 2, (100,))
    return made | {"unused": unused[0, 0]}


def test_arrays_are_those_of_one_program_to_the_bit(monkeypatch):
    whole = jax.jit(make)()
    where = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where) for name, array in whole.items()}
    jit = Mock(side_effect=jax.jit)
    monkeypatch.setattr(fresh.jax, "jit", jit)
    made = fresh.arrays_of(make, shapes)
    assert made.keys() == whole.keys()
    for name, array in whole.items():
        assert made[name].dtype == array.dtype and made[name].sharding == where
        np.testing.assert_array_equal(np.asarray(made[name]), np.asarray(array), err_msg=name)
    # a and c, and the two of zeros, are made alike.
    assert jit.call_count == len(made) - 2 - len({"small", "number"})
