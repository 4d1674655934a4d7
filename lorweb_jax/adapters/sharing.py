"""What may make the members of a basis share the work while it is trained. The published recipe has none of it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def imbalance(coefficients: Mapping[str, jax.Array]) -> jax.Array:
    """log n − H(p), averaged over layers: 0 where all members are used alike over a batch, log n where one member takes
    everything, whatever each example does.

    coefficients: {path: c [l, b, n]}. p_n is the mean over the batch of |c_n| / Σ|c|; H its entropy in nats.
    """
    layers = []
    for c in coefficients.values():
        size = jnp.abs(c)
        p = (size / (size.sum(-1, keepdims=True) + 1e-12)).mean(1)
        layers.append(jnp.log(c.shape[-1]) + (p * jnp.log(p + 1e-12)).sum(-1))
    return jnp.concatenate(layers).mean()


def drop_members(
    coefficients: Mapping[str, jax.Array], key: jax.Array, share: float, renormalise: bool
) -> dict[str, jax.Array]:
    """Coefficients {path: c [l, b, n]} of a training step in which every layer goes without some members, each left out
    with probability `share`, independently for each example.

    renormalise: the rest is scaled to the sum that there was, as a softmax over the members that are left does; where
    none would be, all stay. Otherwise it is divided by 1 − share, so that its expectation stays.
    """
    dropped = {}
    for number, path in enumerate(sorted(coefficients)):
        c = coefficients[path]
        kept = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, number), 1 - share, c.shape), c, 0)
        if not renormalise:
            dropped[path] = kept / (1 - share)
            continue
        before, after = (x.sum(-1, keepdims=True) for x in (c, kept))
        dropped[path] = jnp.where(after > 0, kept * (before / jnp.where(after > 0, after, 1)), c)
    return dropped
