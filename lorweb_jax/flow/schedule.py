"""Noise levels for sampling and for training (FLUX's flow-matching Euler schedule, method.md §1 and §5)."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, as_dataclass, checked, require_class

TRAIN_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How sampling spaces its noise levels, named as in scheduler_config.json."""

    base_image_seq_len: Annotated[int, Between(1, 1_000_000)] = 256
    max_image_seq_len: Annotated[int, Between(1, 1_000_000)] = 4096
    base_shift: Annotated[float, Between(-10.0, 10.0)] = 0.5
    max_shift: Annotated[float, Between(-10.0, 10.0)] = 1.15

    def __post_init__(self):
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise UserError(
                f"the schedule's base_image_seq_len is {self.base_image_seq_len}, it must be below "
                f"max_image_seq_len, which is {self.max_image_seq_len}; correct scheduler_config.json"
            )

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str | Path = "scheduler_config.json") -> "Schedule":
        """From diffusers' scheduler_config.json, called `source` in messages. UserError for a wrong type or size, or
        another schedule than FLUX's."""
        require_class(values, "FlowMatchEulerDiscreteScheduler", source)
        return as_dataclass(checked(values, _ScheduleFile, source), cls)

    def shift(self, tokens: int) -> float:
        """mu, linear in the number of noisy tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + self.base_shift - slope * self.base_image_seq_len

    def sigmas(self, steps: int, tokens: int) -> np.ndarray:
        """steps + 1 noise levels from 1 to 0, float32: linspace(1, 1/steps), shifted, then 0."""
        sigma = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32).astype(np.float64)
        shift = np.exp(self.shift(tokens))
        return np.append(shift / (shift + (1.0 / sigma - 1.0)), 0.0).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _ScheduleFile(Schedule):
    """scheduler_config.json, with what it may say only in one way."""

    use_dynamic_shifting: Annotated[bool, Between(True, True)] = dataclasses.field(kw_only=True)
    num_train_timesteps: Annotated[int, Between(TRAIN_STEPS, TRAIN_STEPS)] = TRAIN_STEPS
    time_shift_type: Literal["exponential"] = "exponential"
    shift_terminal: None = None
    invert_sigmas: Annotated[bool, Between(False, False)] = False
    stochastic_sampling: Annotated[bool, Between(False, False)] = False
    use_karras_sigmas: Annotated[bool, Between(False, False)] | None = False
    use_exponential_sigmas: Annotated[bool, Between(False, False)] | None = False
    use_beta_sigmas: Annotated[bool, Between(False, False)] | None = False


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


PAIR_SHIFT = 1.15  # mu of Pair Customization's training, whatever the resolution


def pair_times() -> np.ndarray:
    """The 1000 times t that training on an image pair draws from, uniformly by index: from 1 to 0 (method.md §7)."""
    s = 1 - np.arange(TRAIN_STEPS) / (TRAIN_STEPS - 1)
    shift = np.exp(PAIR_SHIFT)
    return (shift * s / (shift * s + 1 - s)).astype(np.float32)


def published_tokens(height: int, width: int) -> int:
    """The number of tokens that Pair Customization's published sampler shifts its times by, for an image in pixels: a
    64th of what there are (method.md §7)."""
    return (height // 8) * (width // 8) // 256
