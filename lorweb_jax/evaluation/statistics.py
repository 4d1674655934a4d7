"""Means over tasks, their bootstrap intervals, and differences between two methods on the same tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 5000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean over tasks and its interval; None where there are fewer than two tasks."""

    mean: float
    interval: tuple[float, float] | None

    def to_json(self) -> dict:
        return {"mean": self.mean, "interval_95": self.interval and list(self.interval)}


class Difference(NamedTuple):
    """One method minus another, task by task: mean and interval, and on what share of the tasks the first is better.

    A tie counts half.
    """

    difference: Estimate
    tasks_won: float
    tasks: int


def bootstrap_interval(
    values: Sequence[float], confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [n], n ≥ 2, drawn anew `resamples` times with replacement.

    The same values give the same interval. Raises ValueError for fewer than two values.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"a bootstrap takes two or more values, not {x.shape}")
    draws = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    low, high = np.percentile(x[draws].mean(1), [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def crossed_interval(
    values: np.ndarray, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of values [seeds, tasks], tasks ≥ 2: each time seeds and tasks are both
    drawn anew with replacement, so that it holds for other tasks and other trainings. With one seed it is that of
    `bootstrap_interval`. Raises ValueError for fewer than two tasks."""
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or x.shape[0] < 1 or x.shape[1] < 2:
        raise ValueError(f"values are [seeds, tasks] with two tasks or more, not {x.shape}")
    random = np.random.default_rng(seed)
    # Tasks first: with one seed, the draws are those of `bootstrap_interval`.
    tasks, seeds = (random.integers(0, count, (resamples, count)) for count in x.shape[::-1])
    means = x[seeds[:, :, None], tasks[:, None]].mean((1, 2))
    low, high = np.percentile(means, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(low), float(high)


def estimate(by_task: Mapping[Any, float]) -> Estimate | None:
    """Of {task: its mean}; None for no task."""
    values = list(by_task.values())
    if not values:
        return None
    return Estimate(float(np.mean(values)), bootstrap_interval(values) if len(values) > 1 else None)


def paired(first: Mapping[Any, float], second: Mapping[Any, float], lower: bool) -> Difference | None:
    """first − second, of {task: mean} of the tasks that both have; lower: whether less is better. None for no task."""
    differences = {task: first[task] - second[task] for task in first if task in second}
    average = estimate(differences)
    if average is None:
        return None
    x = np.asarray(list(differences.values()))
    better = x < 0 if lower else x > 0
    return Difference(average, float(np.mean(better + 0.5 * (x == 0))), len(x))
