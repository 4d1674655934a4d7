"""Methods of making b′ compared on the same analogies: one table, one sheet of pictures (method.md section 9)."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies, Analogy, Pair, Task
from lorweb_jax.data.problems import Problems, reason
from lorweb_jax.evaluation import metrics
from lorweb_jax.evaluation.lpips import lpips
from lorweb_jax.evaluation.table import TRUTH, Table
from lorweb_jax.images.grid import fit_to_model, other_shape, quadrants, target_grid
from lorweb_jax.images.pictures import sheet
from lorweb_jax.images.resize import resize

BATCH = 16  # images of one size that a model is given at once
STRETCHED = "its images have another shape than those of the first pair, to which they are stretched"
LARGEST_SHOWN = 192  # px of an image's longer edge in a sheet


@dataclass(frozen=True, eq=False)
class Sample:
    """An analogy with its true answer: uint8 images [h, w, 3] of one size, the quadrants of the grid."""

    task: str
    caption: str
    a: np.ndarray
    a2: np.ndarray
    b: np.ndarray
    b2: np.ndarray

    @property
    def condition(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a method may see beside the caption."""
        return self.a, self.a2, self.b


class Embedder(Protocol):
    """models.image_encoder.encoder.ImageEncoder, or anything that embeds images."""

    def embed(self, images: list[np.ndarray]) -> np.ndarray: ...


Method = Callable[[Sequence[Sample]], Sequence[np.ndarray]]


def read_samples(tasks: Sequence[Task], per_task: int, problems: Problems, max_size: int | None = None) -> list[Sample]:
    """`per_task` analogies of each task, or all where there are fewer; the same ones at every call.

    Their images are the quadrants of the target grid as the model gets it: b and the edited images at a's size, the
    grid within `max_size` and at a multiple of 16 px. An analogy with a file that can't be used is replaced by
    another one of its task where there is one; the file goes into `problems`, the replacement is counted there.

    Raises UserError if `per_task` is below 1 or no analogy at all can be read.
    """
    samples, bad = [], set()
    for task, (chosen, spares) in zip(tasks, _candidates(tasks, per_task), strict=True):
        read = [_read(analogy, task, max_size, bad, problems) for analogy in chosen]
        lost = read.count(None)
        others = (_read(analogy, task, max_size, bad, problems) for analogy in spares if lost)
        replaced = list(itertools.islice((sample for sample in others if sample), lost))
        problems.substituted += len(replaced)
        samples += [sample for sample in read if sample] + replaced
    if not samples:
        raise UserError(
            f"no analogy of the data can be read; expected tasks with two readable images each; {problems.summary()}"
        )
    return samples


def _candidates(tasks: Sequence[Task], per_task: int) -> Iterator[tuple[list[Analogy], Iterator[Analogy]]]:
    """For each task the analogies chosen, spread over its pairs, and all others as spares."""
    spread, every = Analogies(tasks, per_task), Analogies(tasks)
    for number in range(len(tasks)):
        chosen = [spread[i] for i in spread.span(number)]
        yield chosen, (every[i] for i in every.span(number) if every[i] not in chosen)


def _read(analogy: Analogy, task: Task, max_size: int | None, bad: set[Pair], problems: Problems) -> Sample | None:
    """None if one of its pairs can't be used; that pair is then in `bad`, and reported."""
    if bad & {analogy.first, analogy.second}:
        return None
    pair = analogy.second
    try:
        b, b2 = pair.read(problems.tell)
        pair = analogy.first
        a, a2 = pair.read(problems.tell)
        # A grid can only be too small, and a sets its size: `pair` is the file at fault here too.
        grid, _ = fit_to_model(target_grid(a, a2, b, b2, max_size))
        if any(other_shape(image.shape[1::-1], a.shape[1::-1]) for image in (a2, b, b2)):
            problems.tell(analogy.second.places[0], STRETCHED)
    except Exception as error:  # whatever is wrong with one image, the others are read
        bad.add(pair)
        problems.add(task.name, task.relative(pair), reason(error))
        return None
    return Sample(task.name, analogy.caption, *quadrants(grid))


def batches(images: Sequence[np.ndarray], largest: int = BATCH) -> Iterator[tuple[list[int], list[int]]]:
    """(indexes, the same padded): images of one size, at most `largest` at a time.

    The batches of a size are padded to one length, by repeating indexes, so that a model is compiled once for it.
    """
    by_size: dict[tuple, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    for indexes in by_size.values():
        length = -(-len(indexes) // -(-len(indexes) // largest))
        for start in range(0, len(indexes), length):
            chosen = indexes[start : start + length]
            yield chosen, (chosen * length)[:length]


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
        sizes = [image.shape for image in results[name]], [sample.b2.shape for sample in samples]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{name} made images {sizes[0]}, expected {sizes[1]}")
    truth = [sample.b2 for sample in samples]
    scores = {name: _scores(images, samples, image_encoder) for name, images in {**results, TRUTH: truth}.items()}
    return Table([sample.task for sample in samples], scores, results)


def _scores(
    images: Sequence[np.ndarray], samples: Sequence[Sample], image_encoder: Embedder | None
) -> dict[str, list[float]]:
    errors = [metrics.mse(image, sample.b2) for image, sample in zip(images, samples)]
    scores = {
        "mse": errors,
        "psnr": [metrics.psnr(error) for error in errors],
        "lpips": distances(images, [sample.b2 for sample in samples]),
        "lpips_b": distances(images, [sample.b for sample in samples]),
    }
    if image_encoder:
        a, a2, b = (_embeddings(image_encoder, list(part)) for part in zip(*(sample.condition for sample in samples)))
        cosines = metrics.clip_directional(a2 - a, _embeddings(image_encoder, images) - b)
        scores["clip_directional"] = [float(cosine) for cosine in cosines]
    return scores


def distances(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> list[float]:
    """LPIPS of each image of x with its partner in y; sizes may differ from pair to pair."""
    result = np.zeros(len(x))
    for chosen, padded in batches(x):
        result[chosen] = lpips(np.stack([x[i] for i in padded]), np.stack([y[i] for i in padded]))[: len(chosen)]
    return result.tolist()


def _embeddings(image_encoder: Embedder, images: Sequence[np.ndarray]) -> np.ndarray:
    """[b, p]; an encoder brings every image to its own size, so all of them count as one."""
    embeddings = [
        image_encoder.embed([images[i] for i in padded])[: len(chosen)]
        for chosen, padded in batches([images[0]] * len(images))
    ]
    return np.concatenate(embeddings)


def rows_sheet(samples: Sequence[Sample], results: Mapping[str, Sequence[np.ndarray]], per_task: int = 1) -> np.ndarray:
    """a, a′, b, what each method made of it, the true b′: the first `per_task` samples of every task, one a row.

    results: {method: images, one per sample}, as in `Table.results`. Returns uint8 [H, W, 3].
    """
    shown: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        shown.setdefault(sample.task, []).append(index)
    rows = []
    for index in itertools.chain(*(indexes[:per_task] for indexes in shown.values())):
        sample = samples[index]
        images = [*sample.condition, *(images[index] for images in results.values()), sample.b2]
        rows.append((f"{sample.task}: {sample.caption}", [_shown(image) for image in images]))
    return sheet(rows, ("a", "a′", "b", *results, TRUTH))


def _shown(image: np.ndarray) -> np.ndarray:
    longest = max(image.shape[:2])
    if longest <= LARGEST_SHOWN:
        return image
    height, width = (max(1, side * LARGEST_SHOWN // longest) for side in image.shape[:2])
    return resize(image, (width, height))
