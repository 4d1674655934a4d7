"""Test-time adaptation: the coefficients of an analogy, and nothing else, fitted to its one pair by gradient steps.

All that is known of an edit is a → a′, so that the loss is the training loss (method.md §5) of a : a′ :: a : a′, in the
expectation over noise and noise level of which Adam takes steps from what the router chose.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
from lorweb_jax.pipeline import devices
from lorweb_jax.pipeline.arguments import Pair
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.settings.seeds import random_key

STEPS, RATE = 16, 0.02  # of Adam; the rate of a basis whose scale is 1


class _Shown(NamedTuple):
    """What the model sees of b pairs: tokens of target and condition, the prompt's encodings, and the draws' keys."""

    x0: jax.Array
    references: jax.Array
    text: jax.Array
    pooled: jax.Array
    keys: jax.Array


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
    callback: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Coefficients c [l, b, n] in float32 after `steps` of Adam from `start`, each of b fitted to its own pair.

    pipeline: a Pipeline with a basis. pairs: b of (a, a′), whose grids have one size; max_size as in `Pipeline.edit`.
    rate: of coefficients times the basis's scale, so that it moves the update of the weights alike in any basis.
    seeds: of each pair's draws, which depend on it alone. remat: compute intermediates again in the backward pass, so
    that it fits wherever sampling does but for a block's intermediates and each block's input. callback: called with
    each step's number as it ends; what it raises ends the adaptation.
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
    x0, references, carry = _begin(model, target, condition, dict(start))
    shown = _Shown(x0, references, text, pooled, keys)
    of_scale = jnp.asarray(rate / model.basis.config.scale)
    for step in range(steps):
        carry = _step(model, of_scale, jnp.asarray(step), shown, carry, size=target.shape[1:3])
        if callback is not None:
            jax.block_until_ready(carry)
            callback(step)
    return {path: np.asarray(to_host(c), np.float32) for path, c in carry[0].items()}


def _rematerialised(transformer: nnx.Module) -> nnx.Module:
    """A module of the same weights."""
    graphdef, state = nnx.split(transformer)
    copy = nnx.merge(graphdef, state)
    copy.remat = "full"
    return copy


@devices.jit
def _begin(model: AnalogyModel, target: jax.Array, condition: jax.Array, start: dict[str, jax.Array]):
    """Tokens of both grids, and what `_step` carries: out of a compiled function, as what it returns is, so that its
    first call compiles it for all."""
    return model.tokens(target), model.tokens(condition), (start, optax.adam(0.0).init(start))


@devices.jit(static_argnames="size")
def _step(model: AnalogyModel, rate: jax.Array, step: jax.Array, shown: _Shown, carry, size: tuple[int, int]):
    """(coefficients, Adam's state) after one more step. size: of the grids, [height, width] in pixels."""
    x0, references, text, pooled, keys = shown

    def loss(coefficients):
        def of_pair(key, x):
            noised = draw(jax.random.fold_in(key, step), x[None], train_timesteps(), train_weights("bell"))
            return jax.tree.map(lambda each: each[0], noised)

        noised, guidance = jax.vmap(of_pair)(keys, x0), jnp.ones(x0.shape[:1])
        adapters: dict[str, Any] = {**_basis(model).adapters(coefficients)}
        velocity = model.velocity(noised.tokens_bsc, references, text, pooled, noised.time_b, guidance, size, adapters)
        # The sum: each pair's coefficients have the gradient of its own loss.
        return weighted_mse(velocity, noised.target_bsc, noised.weight_b)[1].sum()

    coefficients, state = carry
    updates, state = optax.adam(rate).update(jax.grad(loss)(coefficients), state)
    return optax.apply_updates(coefficients, updates), state


def _basis(model: AnalogyModel) -> Basis:
    assert model.basis is not None  # its coefficients are adapted
    return model.basis
