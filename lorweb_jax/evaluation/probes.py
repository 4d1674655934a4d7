"""A basis with other coefficients than those that its router chooses for an analogy: how much does it listen to it?

wrong     those of the same b with the pair a, a′ of another task; what the transformer sees stays as it is
mean      the router's coefficients averaged over all analogies that are evaluated
adapted   those of the router, moved by gradient steps on the analogy's one pair, all weights frozen
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation.samples import Sample, batches
from lorweb_jax.flow.loss import draw, weighted_mse
from lorweb_jax.flow.schedule import train_timesteps, train_weights
from lorweb_jax.images.grid import condition_grid, target_grid
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.settings.seeds import random_key

STEPS, RATE = 16, 0.02  # of Adam, for "adapted"

Chooser = Callable[[Sequence[Sample]], list[Mix]]  # a mix for each sample


def route(pipeline: Pipeline, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """What the router chooses, {path: c [l, b, n]} in float32."""
    return _of_conditions(pipeline, [sample.condition for sample in samples])


def _basis(model: AnalogyModel) -> Basis:
    assert model.basis is not None  # probes are asked of a basis
    return model.basis


def _of_conditions(pipeline: Pipeline, conditions) -> dict[str, np.ndarray]:
    coefficients = _basis(pipeline.model).coefficients(pipeline.query(conditions))
    assert coefficients is not None  # they are known in advance
    return {path: np.asarray(to_host(c), np.float32) for path, c in coefficients.items()}


def chooser(kind: str, pipeline: Pipeline, samples: Sequence[Sample]) -> Chooser:
    """The mixes of one kind ("wrong", "mean", "adapted") for samples of those that are evaluated.

    Raises UserError for a basis whose coefficients don't come from images, and for "wrong" without a second task.
    """
    basis = _basis(pipeline.model)
    if not basis.config.coefficients.from_images:
        raise UserError(
            f"{kind}: asks a router that chooses by images, and this basis has a {basis.config.query} query; "
            "evaluate it without"
        )

    def mixes(coefficients) -> list[Mix]:
        count = next(iter(coefficients.values())).shape[1]
        own = basis.fingerprint()
        return [Mix({path: c[:, i] for path, c in coefficients.items()}, own) for i in range(count)]

    if kind == "wrong":
        partners = wrong_pairs(samples)

        def wrong(chosen):
            pairs = [partners[sample.id] for sample in chosen]
            conditions = [(other.a, other.a2, sample.b) for sample, other in zip(chosen, pairs)]
            return mixes(_of_conditions(pipeline, conditions))

        return wrong
    if kind == "mean":
        average = mixes({path: c[:, None] for path, c in mean_coefficients(pipeline, samples).items()})
        return lambda chosen: average
    return lambda chosen: mixes(adapted(pipeline, chosen))


def wrong_pairs(samples: Sequence[Sample]) -> dict[str, Sample]:
    """{sample's id: a sample of another task of its split}, chosen by the sample alone."""
    partners = {}
    for sample in samples:
        others = [other for other in samples if other.split == sample.split and other.task != sample.task]
        if not others:
            raise UserError("wrong: needs the pair of another task, and there is one task; give data of several tasks")
        partners[sample.id] = others[sample.noise_seed % len(others)]
    return partners


def mean_coefficients(pipeline: Pipeline, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """{path: c [l, n]}, the mean over samples."""
    total: dict[str, np.ndarray] = {}
    for chosen, padded in batches([sample.b for sample in samples]):
        for path, c in route(pipeline, [samples[i] for i in padded]).items():
            total[path] = total.get(path, 0) + c[:, : len(chosen)].astype(np.float64).sum(1)
    return {path: (c / len(samples)).astype(np.float32) for path, c in total.items()}


def adapted(
    pipeline: Pipeline, samples: Sequence[Sample], steps: int = STEPS, rate: float = RATE
) -> dict[str, np.ndarray]:
    """The router's c [l, b, n] after `steps` of Adam on each sample's own loss, all weights frozen.

    All that is known of an analogy's edit is a → a′, so that the loss is the training loss of a : a′ :: a : a′. A
    sample's draws depend on the sample alone.
    """
    grids = [
        (target_grid(each.a, each.a2, each.a, each.a2), condition_grid(each.a, each.a2, each.a)) for each in samples
    ]
    target, condition = (jnp.asarray(np.stack(images)) for images in zip(*grids))
    text, pooled = pipeline.prompt([sample.caption for sample in samples])
    keys = jnp.stack([random_key(sample.noise_seed) for sample in samples])
    start = _basis(pipeline.model).coefficients(pipeline.query([sample.condition for sample in samples]))
    model = pipeline.model.only("transformer", "vae", "basis")
    moved = _adapt(model, steps, rate, target, condition, text, pooled, keys, start)
    return {path: np.asarray(to_host(c), np.float32) for path, c in moved.items()}


@functools.partial(nnx.jit, static_argnums=(1, 2))
def _adapt(model: AnalogyModel, steps: int, rate: float, target, condition, text, pooled, keys, start):
    x0, references = model.tokens(target), model.tokens(condition)
    optimizer, size = optax.adam(rate), target.shape[1:3]
    guidance = jnp.ones(x0.shape[:1])

    def loss(coefficients, step):
        def of_sample(key, x):
            noised = draw(jax.random.fold_in(key, step), x[None], train_timesteps(), train_weights("bell"))
            return jax.tree.map(lambda each: each[0], noised)

        noised = jax.vmap(of_sample)(keys, x0)
        adapters: dict[str, Any] = {**_basis(model).adapters(coefficients)}
        velocity = model.velocity(noised.tokens_bsc, references, text, pooled, noised.time_b, guidance, size, adapters)
        # The sum: each sample's coefficients have the gradient of its own loss.
        return weighted_mse(velocity, noised.target_bsc, noised.weight_b)[1].sum()

    def update(carry, step):
        coefficients, state = carry
        updates, state = optimizer.update(jax.grad(loss)(coefficients, step), state)
        return (optax.apply_updates(coefficients, updates), state), None

    (coefficients, _), _ = jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(steps))
    return coefficients
