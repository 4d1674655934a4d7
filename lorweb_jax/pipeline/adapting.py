"""Test-time adaptation: the coefficients of an analogy, and nothing else, fitted to its one pair by gradient steps.

All that is known of an edit is a → a′, so that the loss is the training loss (method.md §5) of a : a′ :: a : a′, in the
expectation over noise and noise level of which Adam takes steps from what the router chose.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.flow.loss import draw, weighted_mse
from lorweb_jax.flow.schedule import train_timesteps, train_weights
from lorweb_jax.images.grid import condition_grid, fit_to_model, target_grid
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.arguments import Pair
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.settings.seeds import random_key

STEPS, RATE = 16, 0.02  # of Adam; the rate of a basis whose scale is 1


def adapted(
    pipeline: Any,
    pairs: Sequence[Pair],
    prompts: Sequence[str],
    seeds: Sequence[int],
    start: Mapping[str, jax.Array],
    steps: int = STEPS,
    rate: float = RATE,
    max_size: int | None = None,
    remat: bool = False,
) -> dict[str, np.ndarray]:
    """Coefficients c [l, b, n] in float32 after `steps` of Adam from `start`, each of b fitted to its own pair.

    pipeline: a Pipeline with a basis. pairs: b of (a, a′), whose grids have one size; max_size as in `Pipeline.edit`.
    rate: of coefficients times the basis's scale, so that it moves the update of the weights alike in any basis.
    seeds: of each pair's draws, which depend on it alone. remat: compute intermediates again in the backward pass, so
    that it fits wherever sampling does but for a block's intermediates and each block's input.
    """
    grids = [
        [
            fit_to_model(grid)[0]
            for grid in (target_grid(a, a2, a, a2, max_size), condition_grid(a, a2, a, max_size=max_size))
        ]
        for a, a2 in pairs
    ]
    target, condition = (jnp.asarray(np.stack(images)) for images in zip(*grids))
    text, pooled = pipeline.prompt(list(prompts))
    keys = jnp.stack([random_key(seed) for seed in seeds])
    model = pipeline.model.only("transformer", "vae", "basis")
    if remat:
        model = model.replace(transformer=_rematerialised(model.transformer))
    rate /= model.basis.config.scale
    moved = _adapt(model, jnp.asarray(steps), jnp.asarray(rate), target, condition, text, pooled, keys, dict(start))
    return {path: np.asarray(to_host(c), np.float32) for path, c in moved.items()}


def _rematerialised(transformer: nnx.Module) -> nnx.Module:
    """A module of the same weights."""
    graphdef, state = nnx.split(transformer)
    copy = nnx.merge(graphdef, state)
    copy.remat = "full"
    return copy


@nnx.jit
def _adapt(model: AnalogyModel, steps: jax.Array, rate: jax.Array, target, condition, text, pooled, keys, start):
    x0, references = model.tokens(target), model.tokens(condition)
    optimizer, size = optax.adam(rate), target.shape[1:3]
    guidance = jnp.ones(x0.shape[:1])

    def loss(coefficients, step):
        def of_pair(key, x):
            noised = draw(jax.random.fold_in(key, step), x[None], train_timesteps(), train_weights("bell"))
            return jax.tree.map(lambda each: each[0], noised)

        noised = jax.vmap(of_pair)(keys, x0)
        adapters: dict[str, Any] = {**_basis(model).adapters(coefficients)}
        velocity = model.velocity(noised.tokens_bsc, references, text, pooled, noised.time_b, guidance, size, adapters)
        # The sum: each pair's coefficients have the gradient of its own loss.
        return weighted_mse(velocity, noised.target_bsc, noised.weight_b)[1].sum()

    def update(step, carry):
        coefficients, state = carry
        updates, state = optimizer.update(jax.grad(loss)(coefficients, step), state)
        return optax.apply_updates(coefficients, updates), state

    # A loop of any length: compiling takes far longer than some steps, and is done once for a size of images.
    return jax.lax.fori_loop(0, steps, update, (start, optimizer.init(start)))[0]


def _basis(model: AnalogyModel) -> Basis:
    assert model.basis is not None  # its coefficients are adapted
    return model.basis
