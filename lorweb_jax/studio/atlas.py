"""The tasks of a data set by the coefficients that a router gives them, to hold an analogy against."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorweb_jax.adapters.mix import Mix
from lorweb_jax.data.analogies import Analogies, Analogy
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.evaluation.routing import on_a_plane, shares
from lorweb_jax.images.grid import within
from lorweb_jax.pipeline.pipeline import Pipeline

MOST = 240  # analogies that are looked at
EACH = 3  # of a task, at most
BATCH = 8  # that the image encoder sees at once


class Place(NamedTuple):
    """Where a mix lies among the atlas's analogies.

    nearest: (task, distance) of all tasks, nearest first; the distance is to the mean of a task's coefficients, as root
    mean square over layers. plane: [b + 1, 2], of the analogies and, last, of the mix; explained: the part of the
    variance that the plane keeps.
    """

    nearest: list[tuple[str, float]]
    plane: np.ndarray
    explained: float


class Atlas:
    """Made once for all tabs, when it is first asked for. data: a data set in any layout of docs/data.md."""

    def __init__(self, pipeline: Pipeline, data: Path):
        self._pipeline, self._data, self._lock = pipeline, data, threading.Lock()
        self._points: list[np.ndarray] = []
        self.analogies: list[Analogy] = []

    def fill(self, tell: Callable[[int, int], None]) -> None:
        """Look at the data, as far as that wasn't done. tell(done, total): of the analogies; what it raises ends the
        work, which the next call goes on with.

        Raises UserError for data that can't be read.
        """
        with self._lock:
            if not self.analogies:
                self.analogies = _spread(Analogies(read_tasks(self._data, Problems()), limit=EACH))
            while (done := len(self._points)) < len(self.analogies):
                tell(done, len(self.analogies))
                batch = [self.images(each) for each in self.analogies[done : done + BATCH]]
                self._points += map(_point, self._pipeline.coefficients_batch(batch))

    def images(self, analogy: Analogy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """a, a′ and b, of at most the size that the model was trained at."""
        size = self._pipeline.folder.vae_config.sample_size
        a, a2, b, _ = (within(image, size) for image in analogy.read())
        return a, a2, b

    def place(self, mix: Mix) -> Place:
        """Where a mix of the pipeline's basis lies."""
        point, points = _point(mix), np.stack(self._points)
        tasks = list(dict.fromkeys(analogy.task for analogy in self.analogies))
        of_task = [[i for i, each in enumerate(self.analogies) if each.task == task] for task in tasks]
        means = np.stack([points[rows].mean(0) for rows in of_task])
        distances = np.linalg.norm(means - point, axis=1)
        order = np.argsort(distances, kind="stable")
        plane, explained = on_a_plane(np.concatenate([points, point[None]]))
        return Place([(tasks[i], float(distances[i])) for i in order], plane, explained)


def _spread(analogies: Analogies) -> list[Analogy]:
    """All of them, or the first of every so many tasks where there are more than MOST."""
    if len(analogies) <= MOST:
        return list(analogies)
    tasks = range(0, len(analogies.tasks), -(-len(analogies.tasks) // MOST))
    return [analogies[analogies.span(task)[0]] for task in tasks]


def _point(mix: Mix) -> np.ndarray:
    """All coefficients in a row, so that the distance between two is the root mean square over layers."""
    arrays = [np.asarray(c, np.float64) for c in mix.coefficients.values()]
    return np.concatenate([c.ravel() for c in arrays]) / np.sqrt(sum(len(c) for c in arrays))


def by_layer(mix: Mix) -> tuple[np.ndarray, list[str]]:
    """(shares |c| / Σ|c| of the members [rows, n], rows' names): a row for each adapted stack, its blocks averaged."""
    return np.stack([shares(c).mean(0) for c in mix.coefficients.values()]), [_short(path) for path in mix.coefficients]


def by_block(mix: Mix) -> tuple[np.ndarray, list[str]]:
    """The same with a row for each block of each stack."""
    names = [f"{_short(path)} {block}" for path, c in mix.coefficients.items() for block in range(len(c))]
    return np.concatenate([shares(c) for c in mix.coefficients.values()]), names


def _short(path: str) -> str:
    """A path that fits beside a heat map."""
    return path.replace("transformer_blocks", "blocks")
