"""Noise levels for sampling and for training (FLUX's flow-matching Euler schedule, method.md §1 and §5)."""

import dataclasses
from typing import Any

import numpy as np

TRAIN_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How sampling spaces its noise levels, named as in scheduler_config.json."""

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Schedule":
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    def shift(self, tokens: int) -> float:
        """mu, linear in the number of noisy tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """steps + 1 noise levels from 1 to 0, float32: linspace(1, 1/steps), shifted, then 0."""
        sigma = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32).astype(np.float64)
        shift = np.exp(self.shift(tokens))
        return np.append(shift / (shift + (1.0 / sigma - 1.0)), 0.0).astype(np.float32)


def train_timesteps() -> np.ndarray:
    """The timesteps that training draws from, uniformly by index: 1000, 999, …, 1 (float32)."""
    return np.linspace(TRAIN_STEPS, 1, TRAIN_STEPS, dtype=np.float32)


def bell_weights() -> np.ndarray:
    """The loss weight of each of `train_timesteps`, by index: a bell of mean 1 that vanishes at its lower end."""
    x = np.arange(TRAIN_STEPS, dtype=np.float64)
    y = np.exp(-2.0 * ((x - TRAIN_STEPS / 2) / TRAIN_STEPS) ** 2)
    y = y - y.min()
    return (y * (TRAIN_STEPS / y.sum())).astype(np.float32)


def train_weights(name: str) -> np.ndarray:
    """Loss weights by the index of the timestep: "bell" (the published recipe) or "uniform"."""
    return {"bell": bell_weights, "uniform": lambda: np.ones(TRAIN_STEPS, np.float32)}[name]()
