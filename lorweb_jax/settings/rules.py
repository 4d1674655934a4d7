"""What a value may be: rules for fields of configs, options of commands and arguments of the public interface.

Nothing here imports jax, so that bad values are reported before anything is loaded.
"""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorweb_jax.common.errors import UserError

_LONGEST_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Whole:
    """A whole number in low..high, a multiple of `multiple`; or one of `also`. Booleans are refused."""

    low: int
    high: int
    multiple: int = 1
    also: tuple[int | None, ...] = ()

    def takes(self, value: Any) -> bool:
        if value is None:
            return None in self.also
        return type(value) is int and (
            value in self.also or self.low <= value <= self.high and value % self.multiple == 0
        )

    def __str__(self) -> str:
        kind = "a whole number" if self.multiple == 1 else f"a multiple of {self.multiple}"
        return " or ".join([f"{kind} from {self.low:,} to {self.high:,}", *map(str, self.also)])


@dataclass(frozen=True)
class Real:
    """A finite number in low..high; `above` excludes low, `below` excludes high."""

    low: float
    high: float
    above: bool = False
    below: bool = False

    def takes(self, value: Any) -> bool:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            return False
        return not (self.above and value == self.low or self.below and value == self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return f"a number {low} and {'below' if self.below else 'at most'} {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of `words`."""

    words: tuple[str, ...]

    def takes(self, value: Any) -> bool:
        return type(value) is str and value in self.words

    def __str__(self) -> str:
        return " or ".join([", ".join(self.words[:-1]), self.words[-1]] if len(self.words) > 1 else self.words)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def takes(self, value: Any) -> bool:
        return type(value) is bool

    def __str__(self) -> str:
        return "True or False"


def _is_text(value: Any) -> bool:
    """Whether it is a text that a command line can hold."""
    if type(value) is not str or "\0" in value:
        return False
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Folder:
    """A path; with `empty` also "". A run may go on with another path to the same files (runs/folder.py)."""

    empty: bool = False

    def takes(self, value: Any) -> bool:
        return _is_text(value) and (self.empty or bool(value.strip()))

    def __str__(self) -> str:
        return "a path or empty" if self.empty else "a path"


@dataclass(frozen=True)
class Several:
    """A list or tuple of `least` to `most` values that `each` takes."""

    each: "Rule"
    least: int
    most: int

    def takes(self, value: Any) -> bool:
        return (
            isinstance(value, list | tuple)
            and self.least <= len(value) <= self.most
            and all(map(self.each.takes, value))
        )

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{count} values, each {self.each}"


@dataclass(frozen=True)
class Either:
    """What one of two rules takes."""

    one: "Rule"
    other: "Rule"

    def takes(self, value: Any) -> bool:
        return self.one.takes(value) or self.other.takes(value)

    def __str__(self) -> str:
        return f"{self.one}, or {self.other}"


@dataclass(frozen=True)
class Steps:
    """Training steps as the log counts them, from 1: "" for none, "5", or "5-7" for 5, 6 and 7."""

    def takes(self, value: Any) -> bool:
        if type(value) is not str or not re.fullmatch(r"([1-9]\d{0,8}(-[1-9]\d{0,8})?)?", value, re.ASCII):
            return False
        return not value or len(steps_of(value)) > 0

    def __str__(self) -> str:
        return "empty, a step such as 5, or a range such as 5-7"


@dataclass(frozen=True)
class Text:
    """A text that holds something besides spaces."""

    def takes(self, value: Any) -> bool:
        return _is_text(value) and bool(value.strip())

    def __str__(self) -> str:
        return "a text that is not empty"


@dataclass(frozen=True)
class Blocks:
    """A list of blocks: one of `names`, indices and ranges of them such as "0-10,12", or a list of indices."""

    names: tuple[str, ...]

    def takes(self, value: Any) -> bool:
        if isinstance(value, list | tuple):
            return bool(value) and all(type(index) is int and 0 <= index < 10_000 for index in value)
        return type(value) is str and (
            value in self.names or bool(re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", value, re.ASCII))
        )

    def __str__(self) -> str:
        return f"{', '.join(self.names)} or indices such as 0-10,12"


def steps_of(value: str) -> range:
    """The steps that `Steps` takes."""
    first, _, last = value.partition("-")
    return range(int(first), int(last or first) + 1) if value else range(0)


Rule = Whole | Real | Choice | Flag | Folder | Several | Either | Steps | Text | Blocks

SHARE = Real(0, 1)  # a probability
GUIDANCE = Real(0, 100)
STRENGTH = Real(-1000, 1000)  # of a style
ADAPTATION_RATE = Real(0, 10, above=True)
SAMPLING_STEPS = Whole(1, 1000)
SHOWN_PER_TASK = Whole(1, 10**6)
SHOWN_AT_ONCE = Whole(1, 65_536)
SEED = Whole(0, 2**64 - 1)  # each gives other random keys (seeds.py)
SIDE = Whole(8, 4096, multiple=8)  # of a quadrant, pixels: its latents then divide into 2x2 patches
BUCKETS = Several(Several(SIDE, 2, 2), 0, 64)  # (height, width) of quadrants, pixels
WORKERS = Whole(0, 1024)
BATCH = Whole(1, 2**20)
MESH_AXIS = Whole(1, 2**20, also=(-1,))


def shown(value: Any) -> str:
    """A value as it stands in a message, shortened. (Python refuses to print integers of thousands of digits.)"""
    try:
        text = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…"


def as_value(number: Any, name: str, rule: Rule) -> Any:
    """The number (of Python or numpy) if the rule takes it; else UserError, which calls it `name`."""
    value = number.item() if isinstance(number, np.generic) else number
    if not rule.takes(value):
        raise UserError(f"{name} is {shown(number)}; give {rule}", 2)
    return value
