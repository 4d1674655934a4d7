"""Random keys from seeds, of which all 64 bits count."""

import jax
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.fields import SEED, shown


def random_key(seed: int) -> jax.Array:
    """The key of a seed, another one for each of 0 to 2^64 − 1; below 2^32 it is jax.random.key's.

    jax takes 32 bits of a Python number, unless it is told to compute in 64. Raises UserError for any other seed.
    """
    seed = seed.item() if isinstance(seed, np.generic) else seed
    if not SEED.takes(seed):
        raise UserError(f"the seed is {shown(seed)}; give {SEED}", 2)
    high, low = divmod(seed, 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
