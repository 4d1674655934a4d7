"""Samples of a batch: an analogy of a given number, read, drawn (reverse? drop the caption?) and made into grids."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies, Analogy, Pair
from lorweb_jax.data.buckets import Shape
from lorweb_jax.data.problems import Problem, reason
from lorweb_jax.images import grid
from lorweb_jax.images.resize import resize

STRETCHED = "its images have another shape than the quadrants of a grid, to which they are stretched"


class SampleReader:
    """Makes a sample of an analogy's number and a random generator; sent to the worker processes."""

    def __init__(
        self,
        analogies: Analogies,
        quadrants: Sequence[Shape] | None,
        max_size: int | None,
        caption_drop: float,
        reverse_probability: float,
    ):
        self._analogies = analogies
        self._quadrants = quadrants  # by number of the task
        self._max_size = max_size
        self._caption_drop = caption_drop
        self._reverse_probability = reverse_probability

    def __call__(self, index: int, rng: np.random.Generator) -> dict:
        # Both are always drawn, so that changing one probability leaves the other's outcomes as they were.
        drop, reverse = rng.random(2) < (self._caption_drop, self._reverse_probability)
        notes: dict[str, str] = {}  # what was left out of files -> such a file
        analogy, images, problems = self._read(index, lambda path, what: notes.setdefault(what, path))
        if reverse:
            analogy, images = analogy.reverse(), [pair[::-1] for pair in images]
        (a, a_prime), (b, b_prime) = images
        # Resized once here, a', b and b' are not resized for each grid anew.
        # Another analogy than the one drawn takes its bucket's shape too, as all of a batch do.
        size = self._quadrants[self._analogies.task_of(index)][::-1] if self._quadrants else a.shape[1::-1]
        for pair, pictures in zip((analogy.first, analogy.second), images):
            if any(grid.other_shape(picture.shape[1::-1], size) for picture in pictures):
                notes.setdefault(STRETCHED, pair.places[0])
        a, a_prime, b, b_prime = (resize(image, size) for image in (a, a_prime, b, b_prime))
        condition, note = grid.fit_to_model(grid.condition_grid(a, a_prime, b, self._max_size))
        target, _ = grid.fit_to_model(grid.target_grid(a, a_prime, b, b_prime, self._max_size))
        if note:
            notes[note] = "the grids"
        return {
            "condition": condition,
            "target": target,
            "images": np.stack(grid.quadrants(condition)[:3]),
            "caption": "" if drop else analogy.caption,
            "task": analogy.task,
            "pairs": np.array(analogy.pair_ids, np.int32),
            "reversed": np.bool_(reverse),
            "problems": tuple(problems),
            "notes": tuple(notes.items()),
        }

    def _read(self, index: int, tell: Callable[[str, str], object]) -> tuple[Analogy, list, list[Problem]]:
        """The analogy `index` with its images ((a, a′), (b, b′)), or the next one that can be read.

        Next is the following analogy of the same task, from the task's end on from its start; where no two pairs of
        the task can be read, the first of the following task. Also returns what could not be read.
        """
        analogies, images, problems = self._analogies, {}, []
        number = analogies.task_of(index)
        first = analogies.span(number)
        spans = [range(index, first.stop), range(first.start, index)]
        spans += [analogies.span((number + i) % len(analogies.tasks)) for i in range(1, len(analogies.tasks))]
        for candidate in itertools.chain(*spans):
            analogy = analogies[candidate]
            for pair_id, pair in zip(analogy.pair_ids, (analogy.first, analogy.second), strict=True):
                if pair_id not in images:
                    try:
                        images[pair_id] = self._images(pair, tell)
                    except Exception as error:  # whatever is wrong with one image, the others are read
                        images[pair_id] = None
                        task = analogies.tasks[analogies.task_of(candidate)]
                        problems.append(Problem(task.name, task.relative(pair), reason(error)))
                if images[pair_id] is None:
                    break
            else:
                return analogy, [images[pair_id] for pair_id in analogy.pair_ids], problems
        raise UserError(
            f"none of the {len(analogies)} analogies can be read; the first of {len(problems)} problems: "
            f"task {problems[0].task}, {problems[0].file}: {problems[0].reason}; check the data folder"
        )

    def _images(self, pair: Pair, tell: Callable[[str, str], object]) -> tuple[np.ndarray, np.ndarray]:
        before, after = pair.read(tell)
        sides = before.shape[:2]
        shrink = min(1, self._max_size / (2 * max(sides))) if self._max_size else 1
        # Any size can be brought to a given quadrant; as the first image, one this small leaves no whole token.
        if not self._quadrants and int(2 * min(sides) * shrink) < 16:
            raise UserError(
                f"{pair.places[0]} makes a quadrant with a side below 8 pixels; expected 8 or more; replace "
                "the file or give a quadrant size"
            )
        return before, after


def stack(samples: Sequence[dict]) -> dict:
    """Stacks samples: arrays along a new first axis, the rest in object arrays (texts keep their length)."""
    sizes = {sample["condition"].shape[:2] for sample in samples}
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise UserError(
            f"the grids of one batch have {len(sizes)} sizes ({shown}), expected one; give a quadrant "
            "size, or use batches of 1"
        )
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if isinstance(values[0], (np.ndarray, np.generic)):
            batch[name] = np.stack(values)
        else:
            batch[name] = np.empty(len(values), object)
            batch[name][:] = values
    return batch
