"""A basis with other coefficients than those that its router chooses for an analogy: how much does it listen to it?

wrong     those of the same b with the pair a, a′ of another task; what the transformer sees stays as it is
mean      the router's coefficients averaged over all analogies that are evaluated
pairs     the mean of what it chooses for each pair of the analogy's task that is evaluated, its own among them
adapted   those of the router, moved by gradient steps on the analogy's one pair, all weights frozen; of a LoRA, which
          has one member, each layer's strength
"""

from collections.abc import Callable, Sequence

import numpy as np

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.mix import Mix
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.fingerprint import of_image
from lorweb_jax.evaluation.samples import Sample, batches
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline import adapting
from lorweb_jax.pipeline.adapting import RATE, STEPS
from lorweb_jax.pipeline.arguments import Pair
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.pipeline import Pipeline

Chooser = Callable[[Sequence[Sample]], list[Mix]]  # a mix for each sample
Coefficients = dict[str, np.ndarray]  # c [l, b, n] by path


def route(pipeline: Pipeline, samples: Sequence[Sample]) -> Coefficients:
    """What the router chooses, {path: c [l, b, n]} in float32."""
    return _of_conditions(pipeline, [sample.condition for sample in samples])


def _basis(model: AnalogyModel) -> Basis:
    assert model.basis is not None  # probes are asked of a basis
    return model.basis


def _of_conditions(pipeline: Pipeline, conditions) -> Coefficients:
    coefficients = _basis(pipeline.model).coefficients(pipeline.query(conditions))
    assert coefficients is not None  # they are known in advance
    return {path: np.asarray(to_host(c), np.float32) for path, c in coefficients.items()}


def chooser(kind: str, pipeline: Pipeline, samples: Sequence[Sample]) -> Chooser:
    """The mixes of one kind ("wrong", "mean", "pairs", "adapted") for samples of those that are evaluated.

    Raises UserError for a basis whose coefficients don't come from images ("adapted": aren't known beforehand), for
    "wrong" without a second task, and for "pairs" where each task has one pair.
    """
    basis = _basis(pipeline.model)
    coefficients = basis.config.coefficients
    if not (coefficients.in_advance if kind == "adapted" else coefficients.from_images):
        asked = "moves coefficients that are known beforehand" if kind == "adapted" else "asks a router of images"
        raise UserError(f"{kind}: {asked}, and this basis has the query {basis.config.query!r}; evaluate it without")

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
    if kind == "pairs":
        further = further_pairs(samples)

        def of_pairs(chosen):
            several = (pipeline.coefficients_batch([each.condition], more_pairs=further[each.id]) for each in chosen)
            return [mix for [mix] in several]

        return of_pairs
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


def further_pairs(samples: Sequence[Sample]) -> dict[str, list[Pair]]:
    """{sample's id: the pairs a, a′ of the other samples of its task and split}, but for any that shows the sample's
    own b or truth."""
    further = {}
    for sample in samples:
        own = {of_image(image) for image in (sample.b, sample.b2) if image is not None}
        others = [
            other
            for other in samples
            if (other.split, other.task) == (sample.split, sample.task)
            and other is not sample
            and own.isdisjoint((of_image(other.a), of_image(other.a2)))
        ]
        further[sample.id] = [(other.a, other.a2) for other in others]
    if not any(further.values()):
        raise UserError("pairs: needs several pairs of a task, and each has one; give a larger --per-task")
    return further


def mean_coefficients(pipeline: Pipeline, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """{path: c [l, n]}, the mean over samples."""
    total: dict[str, np.ndarray] = {}
    for chosen, padded in batches([sample.b for sample in samples]):
        for path, c in route(pipeline, [samples[i] for i in padded]).items():
            total[path] = total.get(path, 0) + c[:, : len(chosen)].astype(np.float64).sum(1)
    return {path: (c / len(samples)).astype(np.float32) for path, c in total.items()}


def adapted(pipeline: Pipeline, samples: Sequence[Sample], steps: int = STEPS, rate: float = RATE) -> Coefficients:
    """The router's c [l, b, n] after `steps` of Adam on each sample's own pair (pipeline/adapting.py). A sample's draws
    depend on the sample alone."""
    pairs, captions = [(each.a, each.a2) for each in samples], [each.caption for each in samples]
    basis = _basis(pipeline.model)
    routed = basis.config.coefficients.from_images
    query = pipeline.query([sample.condition for sample in samples]) if routed else None
    start = basis.coefficients(query, batch=len(samples))
    assert start is not None  # they are known in advance
    return adapting.adapted(pipeline, pairs, captions, [each.noise_seed for each in samples], start, steps, rate)
