"""Random keys from seeds, of which all 64 bits count."""

from typing import Any

import jax
import numpy as np

from lorweb_jax.config_fields import SEED
from lorweb_jax.errors import UserError


def check_seed(seed: Any) -> int:
    """The seed as an int; UserError unless it is a whole number of 0 to 2^64 − 1."""
    value = seed.item() if isinstance(seed, np.generic) else seed
    if not SEED.takes(value):
        raise UserError(f"the seed is {value!r}; give {SEED}", 2)
    return value


def random_key(seed: int) -> jax.Array:
    """The key of a seed, another one for each of 0 to 2^64 − 1; below 2^32 it is jax.random.key's.

    jax takes 32 bits of a Python number, unless it is told to compute in 64. Raises UserError for any other seed.
    """
    high, low = divmod(check_seed(seed), 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
