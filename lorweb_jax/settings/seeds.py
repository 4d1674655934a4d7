"""Random keys from 64-bit seeds."""

import jax
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.rules import SEED, shown


def random_key(seed: int) -> jax.Array:
    """The key of a seed from 0 to 2^64 − 1, a different one for each; below 2^32 it equals jax.random.key(seed).

    jax.random.key alone drops the upper 32 bits unless jax_enable_x64 is set. Raises UserError for other seeds.
    """
    seed = seed.item() if isinstance(seed, np.generic) else seed
    if not SEED.takes(seed):
        raise UserError(f"the seed is {shown(seed)}; give {SEED}", 2)
    high, low = divmod(seed, 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key
