"""Aspect buckets: pairs of images grouped by shape, so that no picture is squeezed into a square for the batch's sake.

A pair belongs to the bucket whose aspect is nearest to its image before an edit, of several alike the one of the
nearest area. Analogies are made within a task and a bucket. A pair that is alone there joins the nearest bucket in
which its task has others: none is lost.
"""

import collections
import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Pair, Task
from lorweb_jax.data.problems import Problems, reason

Shape = tuple[int, int]  # (height, width) of a quadrant, pixels


def quadrant_shapes(data) -> list[Shape]:
    """The shapes that a config's quadrants have (`data`: its field): the buckets, or one; none where each grid has one
    of its own."""
    if data.buckets:
        return [(height, width) for height, width in data.buckets]
    side = data.quadrant_size
    if not side:
        return []
    return [(side, side)] if isinstance(side, int) else [(side[0], side[1])]


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """Tasks divided by bucket: `groups` has parts of tasks, of one bucket each, bucket after bucket.

    shapes: of each group. shares: what a group has of its task's pairs. moved: how many pairs are in another bucket
    than the nearest, as they would be alone there.
    """

    groups: list[Task]
    shapes: list[Shape]
    shares: list[float]
    moved: int

    def tasks(self, shape: Shape) -> range:
        """The numbers of a bucket's groups."""
        numbers = [number for number, other in enumerate(self.shapes) if other == shape]
        return range(numbers[0], numbers[-1] + 1) if numbers else range(0)

    def summary(self) -> str:
        """The buckets and their pairs, in words."""
        pairs: dict[Shape, int] = {}
        for group, shape in zip(self.groups, self.shapes):
            pairs[shape] = pairs.get(shape, 0) + len(group.pairs)
        text = "pairs by bucket (height x width): " + ", ".join(
            f"{height}x{width} {count:,}" for (height, width), count in pairs.items()
        )
        if self.moved:
            text += f"; {self.moved:,} of them alone of their task in the nearest bucket, and in the next one therefore"
        return text


def divide(tasks: Sequence[Task], shapes: Sequence[Shape], problems: Problems) -> Bucketed:
    """The tasks' pairs by bucket; a bucket without pairs is left out. The headers of all images before are read.

    Adds to `problems`: an image whose header can't be read, a task left with fewer than two pairs. Raises UserError if
    no task is left.
    """
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as threads:
        sizes = list(threads.map(_size, (pair for task in tasks for pair in task.pairs)))
    known = iter(sizes)
    parts: list[tuple[int, int, Task, float]] = []  # bucket, number of the task, group, share
    moved = 0
    for number, task in enumerate(tasks):
        aspects: dict[Pair, Shape] = {}
        for pair, size in zip(task.pairs, known):
            if isinstance(size, str):
                problems.add(task.name, task.relative(pair), size)
            else:
                aspects[pair] = size
        if len(aspects) < 2:
            problems.add(task.name, "", f"{len(aspects)} usable pair(s), an analogy needs 2")
            continue
        chosen = {pair: nearest(size, shapes, range(len(shapes))) for pair, size in aspects.items()}
        moved += _join_lonely(chosen, aspects, shapes)
        for bucket in sorted(set(chosen.values())):
            pairs = tuple(pair for pair in aspects if chosen[pair] == bucket)
            parts.append((bucket, number, dataclasses.replace(task, pairs=pairs), len(pairs) / len(aspects)))
    if not parts:
        raise UserError(f"no task has two images whose size can be read; {problems.summary()}")
    parts.sort(key=lambda part: part[:2])
    groups, shares = [part[2] for part in parts], [part[3] for part in parts]
    return Bucketed(groups, [shapes[part[0]] for part in parts], shares, moved)


def nearest(size: Shape, shapes: Sequence[Shape], among: Sequence[int]) -> int:
    """Which of `among` is the bucket for an image of `size` = (height, width): the nearest aspect (by its logarithm),
    then the nearest area."""
    (height, width) = size

    def distance(bucket: int) -> tuple[float, float]:
        h, w = shapes[bucket]
        area = math.log(h * w / (height * width))
        return round(abs(math.log(w * height / (h * width))), 9), abs(area)

    return min(among, key=distance)


def _join_lonely(chosen: dict[Pair, int], sizes: dict[Pair, Shape], shapes: Sequence[Shape]) -> int:
    """Moves pairs of one task so that no bucket has just one; returns how many."""
    moved = 0
    while True:
        counts = collections.Counter(chosen.values())
        lonely = next((pair for pair, bucket in chosen.items() if counts[bucket] == 1), None)
        if lonely is None:
            return moved
        chosen[lonely] = nearest(sizes[lonely], shapes, sorted(counts.keys() - {chosen[lonely]}))
        moved += 1


def _size(pair: Pair) -> Shape | str:
    """(height, width), or why it isn't known."""
    try:
        width, height = pair.size()
    except Exception as error:  # whatever is wrong with one image, the others are read
        return reason(error)
    return height, width
