"""Methods of making b′ compared on the same analogies: one table, one sheet of pictures (method.md section 9)."""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lorweb_jax.evaluation.lpips import lpips
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.evaluation.scores import Embedder, embedding_scores, pixel_scores
from lorweb_jax.evaluation.table import TRUTH, Table
from lorweb_jax.images.grid import within
from lorweb_jax.images.pictures import SMALLEST, sheet

LARGEST_SHOWN = 192  # px of an image's longer edge in a sheet

Method = Callable[[Sequence[Sample]], Sequence[np.ndarray]]


def evaluate(
    make_results: Mapping[str, Method], samples: Sequence[Sample], image_encoder: Embedder | None = None
) -> Table:
    """Let each method make b′ of every sample, and score it.

    make_results: {method's name: function from samples to uint8 images of the samples' sizes}. Without an encoder
    the table has no CLIP-dir column. Raises UserError if LPIPS isn't installed, before any method is called.
    """
    lpips(samples[0].b[None], samples[0].b[None])
    results = {}
    for name, make in make_results.items():
        results[name] = list(make(samples))
        sizes = [image.shape for image in results[name]], [sample.truth.shape for sample in samples]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} made images {sizes[0]}, expected {sizes[1]}")
    truth = [sample.truth for sample in samples]
    asked = pixel_scores()
    if image_encoder is not None:
        asked += embedding_scores("clip", "CLIP", image_encoder)[:1]
    # The samples have truths: there is no None among the values.
    scores = {
        name: {score.name: [value for value in score(samples, images) if value is not None] for score in asked}
        for name, images in {**results, TRUTH: truth}.items()
    }
    return Table([sample.task for sample in samples], scores, results)


def rows_sheet(
    samples: Sequence[Sample], results: Mapping[str, Sequence[np.ndarray]], per_task: int = 1, smallest: int = SMALLEST
) -> np.ndarray:
    """a, a′, b, what each method made of it, the true b′: the first `per_task` samples of every task, one a row.

    results: {method: images, one per sample}, as in `Table.results`. smallest: as of `sheet`. Returns uint8 [H, W, 3].
    """
    shown: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        shown.setdefault(sample.task, []).append(index)
    rows = []
    for index in itertools.chain(*(indexes[:per_task] for indexes in shown.values())):
        sample = samples[index]
        images = [*sample.condition, *(images[index] for images in results.values()), sample.truth]
        rows.append((f"{sample.task}: {sample.caption}", [within(image, LARGEST_SHOWN) for image in images]))
    return sheet(rows, ("a", "a′", "b", *results, TRUTH), smallest)
