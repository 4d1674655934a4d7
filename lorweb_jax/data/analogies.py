"""Analogies: pairs of images in tasks, and all ordered pairs of pairs by index arithmetic, whatever they are stored in.

A layout of data (data/layouts.py lists them) is a function that makes `Task`s of objects that follow `Pair`. Loader,
evaluation, precomputed embeddings and fingerprints know nothing else of it.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data.problems import Problems

LONGEST_INSTRUCTION = 20_000  # characters; text encoders take a few thousand at most
Tell = Callable[[str, str], object]


class Pair(Protocol):
    """An image before and after an edit, on disk. Hashable, and pickled to the processes that read."""

    @property
    def instruction(self) -> str:
        """The edit in words; may be empty."""

    @property
    def places(self) -> tuple[str, ...]:
        """Paths of the image files, before first. What lies within a larger file has that file's path, a slash and a
        name. No two pairs of a task have the same."""

    def read(self, tell: Tell | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The images (before, after), uint8 [h, w, 3] each.

        tell(path, what) reports what was left out of a file, such as further frames; by default it is printed.
        Raises UserError where they can't be read.
        """

    def size(self) -> tuple[int, int]:
        """(width, height) of the image before, pixels, from the file's header; raises as `read` does."""

    def nbytes(self) -> tuple[int, ...]:
        """Bytes of what lies at each of `places`; -1 where it is gone."""

    def changed(self) -> int:
        """When the newest of the files was last written, nanoseconds; 0 if one is gone."""


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One edit: its name (printable), the folder that places are reported relative to, and its pairs in order."""

    name: str
    folder: str
    pairs: tuple[Pair, ...]

    def relative(self, pair: Pair) -> str:
        """The pair as reports call it: its places relative to the task's folder."""
        return " | ".join(os.path.relpath(place, self.folder) for place in pair.places)


def checked_instruction(text: Any, name: str) -> str:
    """`text` if it can be an instruction; else ValueError, in words for a person, which calls it `name`."""
    if not isinstance(text, str):
        raise ValueError(f"the entry has no {name}")
    if len(text) > LONGEST_INSTRUCTION:
        raise ValueError(f"the {name} has {len(text):,} characters, more than {LONGEST_INSTRUCTION:,}")
    if not is_unicode(text):
        raise ValueError(f"the {name} is no text: it holds half a surrogate pair")
    return text


def is_unicode(text: str) -> bool:
    """Whether every encoder and file can take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def usable_tasks(pairs: Mapping[str, Sequence[Pair]], folder: str, problems: Problems) -> list[Task]:
    """Tasks by name, of pairs that one folder, table or archive lists; {task's name: its pairs}.

    Pairs that are listed again and tasks with fewer than two go into `problems`.
    """
    tasks = []
    for name in sorted(pairs):
        different: dict[tuple[str, ...], Pair] = {}
        for pair in pairs[name]:
            if pair.places in different:
                shown = Task(name, folder, ()).relative(pair)
                problems.add(name, shown, "is listed again; the first counts")
            different.setdefault(pair.places, pair)
        if len(different) < 2:
            problems.add(name, "", f"{len(different)} usable pair(s), an analogy needs 2")
        else:
            tasks.append(Task(printable(name), folder, tuple(different.values())))
    return tasks


def file_bytes(file: str) -> int:
    """The size of a file; -1 if it is gone."""
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def file_changed(*files: str) -> int:
    """When the newest of some files was last written, nanoseconds; 0 if one is gone."""
    try:
        return max(os.stat(file).st_mtime_ns for file in files)
    except OSError:
        return 0


@dataclasses.dataclass(frozen=True, slots=True)
class Analogy:
    """a : a′ :: b : b′ from two pairs of one task. `reversed` swaps before and after in both pairs."""

    task: str
    first: Pair
    second: Pair
    pair_ids: tuple[int, int]
    reversed: bool = False

    @property
    def caption(self) -> str:
        """The first pair's instruction; empty when reversed, for the instruction says a → a′ and not a′ → a."""
        return "" if self.reversed else self.first.instruction

    def reverse(self) -> "Analogy":
        """a′ : a :: b′ : b, the same pairs read from right to left."""
        return dataclasses.replace(self, reversed=not self.reversed)

    def read(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The images a, a′, b, b′, uint8 [h,w,3], in the order after a reversal; raises as `Pair.read` does."""
        (a, a2), (b, b2) = self.first.read(), self.second.read()
        return (a2, a, b2, b) if self.reversed else (a, a2, b, b2)


class Analogies(Sequence[Analogy]):
    """All ordered pairs of different files within a task, by index arithmetic: nothing is listed in memory.

    Analogies of a task are consecutive (`span`); m pairs give m·(m − 1) of them. With `limit` at most that many per
    task, spread evenly over the task's pairs by a golden-ratio stride, so that no pair is favoured as the first.
    Pair ids count the pairs of all tasks in order.
    """

    def __init__(self, tasks: Iterable[Task], limit: int | None = None):
        """Raises UserError if there is no task, a task has fewer than two pairs, or `limit` is below 1."""
        self.tasks = tuple(tasks)
        if not self.tasks:
            raise UserError("no tasks were given; expected one or more with two pairs each; check the data folder")
        if limit is not None and limit < 1:
            raise UserError(f"the limit of analogies per task is {limit}; expected 1 or more, or none")
        self.limit = limit
        self._all = [len(task.pairs) * (len(task.pairs) - 1) for task in self.tasks]
        if 0 in self._all:
            name = self.tasks[self._all.index(0)].name
            raise UserError(f"task {name} has fewer than two image pairs; an analogy needs two; leave the task out")
        counts = self._all if limit is None else [min(count, limit) for count in self._all]
        self._starts = [0, *itertools.accumulate(counts)]
        self._pair_starts = [0, *itertools.accumulate(len(task.pairs) for task in self.tasks)]
        self._strides = [_stride(count) if limit is not None and limit < count else 1 for count in self._all]

    def __len__(self) -> int:
        return self._starts[-1]

    def task_of(self, index: int) -> int:
        """The number of the task that analogy `index` belongs to."""
        return bisect.bisect_right(self._starts, index) - 1

    def span(self, task: int) -> range:
        """The indexes of a task's analogies."""
        return range(self._starts[task], self._starts[task + 1])

    def pair_indexes(self, index: int) -> tuple[int, int]:
        """The positions of the first and the second pair within their task."""
        task = self.task_of(index)
        number = (index - self._starts[task]) * self._strides[task] % self._all[task]
        first, second = divmod(number, len(self.tasks[task].pairs) - 1)
        return first, second + (second >= first)

    def __getitem__(self, index: int) -> Analogy:  # pyrefly: ignore[bad-override]  (nobody needs slices)
        if not -len(self) <= index < len(self):
            raise IndexError(f"analogy {index} of {len(self)}")
        index %= len(self)
        number = self.task_of(index)
        task, start = self.tasks[number], self._pair_starts[number]
        first, second = self.pair_indexes(index)
        return Analogy(task.name, task.pairs[first], task.pairs[second], (start + first, start + second))

    def digest(self) -> str:
        """A short hash of the tasks, their files and their order, the same wherever the folder lies."""
        names = hashlib.sha256(str(len(self)).encode())
        for task in self.tasks:
            names.update(json.dumps([task.name, *(task.relative(pair) for pair in task.pairs)]).encode())
        return names.hexdigest()[:16]


def contents(tasks: Iterable[Task]) -> str:
    """A short hash of what lies in data: names of tasks and files, instructions and the files' sizes, the same wherever
    the folder lies. `Analogies.digest`, which saved positions hold, knows the names alone."""
    digest = hashlib.sha256()
    for task in tasks:
        digest.update(
            json.dumps(
                [task.name, *([task.relative(pair), pair.instruction, *pair.nbytes()] for pair in task.pairs)]
            ).encode()
        )
    return digest.hexdigest()[:16]


def _stride(count: int) -> int:
    """A number near 0.618·count that shares no factor with it, so that its multiples mod count visit everything."""
    stride = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
