"""Scores of edited images and their averages (LoRWeB's evaluation; method.md section 9). float64 on the host."""

import math
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import TypeVar

import numpy as np

Task = TypeVar("Task", bound=Hashable)
SMALLEST_MSE = 1e-10  # equal images have 100 dB, not infinitely many


def mse(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error of two uint8 images [h, w, 3], pixels taken as 0..1: 0 (equal) to 1 (black and white)."""
    if x.shape != y.shape or x.dtype != np.uint8 or y.dtype != np.uint8:
        raise ValueError(f"uint8 images of one size are compared, not {x.dtype} {x.shape} with {y.dtype} {y.shape}")
    return float(np.mean(np.square((x.astype(np.float64) - y) / 255)))


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error from `mse`; at most 100."""
    return -10 * math.log10(max(error, SMALLEST_MSE))


def clip_directional(difference_a: np.ndarray, difference_b: np.ndarray) -> np.ndarray:
    """Cosines [b] between E(a′) − E(a) and E(b′) − E(b), each [b, p]; 0 where nothing was changed (a zero vector).

    E is the encoder's embedding as the router gets it, not scaled to unit length before the subtraction.
    """
    a, b = np.asarray(difference_a, np.float64), np.asarray(difference_b, np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide((a * b).sum(-1), lengths, out=np.zeros_like(lengths), where=lengths > 0)


def task_means(tasks: Sequence[Task], scores: Sequence[float]) -> dict[Task, float]:
    """{task: mean of its scores}, in the order in which the tasks first come."""
    grouped: dict[Task, list[float]] = {}
    for task, score in zip(tasks, scores, strict=True):
        grouped.setdefault(task, []).append(score)
    return {task: mean(values) for task, values in grouped.items()}


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def wilson_interval(wins: float, trials: int, confidence: float = 0.68) -> tuple[float, float]:
    """Wilson's score interval of a rate: the p in 0..1 with |wins/trials − p| ≤ z·√(p(1 − p)/trials).

    Ties may count half. Raises ValueError unless 0 ≤ wins ≤ trials and trials ≥ 1.
    """
    if not 0 <= wins <= trials or trials < 1:
        raise ValueError(f"{wins} wins of {trials} trials")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    rate, spread = wins / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(spread * rate * (1 - rate) + spread * spread / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)
