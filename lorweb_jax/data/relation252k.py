"""Analogy data in the Relation252K layout: tasks and pairs of images, and all analogies of them by index.

`<root>/<task>/<group>/labels.json` lists {img_name, left_image_description, right_image_description,
edit_instruction}; each image file is "before | after" side by side (method.md section 8). The group folder is
`Group1` in the original and has other names in copies, so every sub-folder that holds a labels.json counts, and the
task's own folder may hold it too. What can't be used is skipped and added to a `Problems`; only data without anything
usable is an error.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import INDEX_BYTES
from lorweb_jax.common.user_files import read_text
from lorweb_jax.data.problems import Problems, printable
from lorweb_jax.images.io import read_image

LONGEST_INSTRUCTION = 20_000  # characters; text encoders take a few thousand at most


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One image file "before | after": its path, what is seen left and right, the edit as an instruction."""

    file: str
    left_description: str
    right_description: str
    instruction: str


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One edit: its name (printable), its folder and its pairs, in the order of labels.json."""

    name: str
    folder: str
    pairs: tuple[Pair, ...]

    def relative(self, pair: Pair) -> str:
        """The pair's file as written in reports: relative to the task's folder."""
        return os.path.relpath(pair.file, self.folder)


def _label_files(folder: Path) -> list[Path]:
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [path / "labels.json" for path in folders if (path / "labels.json").is_file()]


def _read_labels(file: Path) -> list:
    """The entries of a labels.json; ValueError, in words for a person, if it isn't a list with entries.

    Lenient: what is wrong with one entry must not cost the others.
    """
    try:
        text = read_text(file, INDEX_BYTES)
    except UserError as error:
        raise ValueError(str(error)) from None
    try:
        entries = json.loads(text)
    except ValueError as error:  # also of numbers with thousands of digits
        raise ValueError(f"is not valid JSON: {error}" if text.strip() else "is empty") from error
    except RecursionError as error:
        raise ValueError("is not valid JSON: nested too deeply") from error
    if not isinstance(entries, list):
        raise ValueError(f"holds a {type(entries).__name__}, expected a list of entries")
    if not entries:
        raise ValueError("lists no images")
    return entries


def _pair(entry, folder: Path) -> Pair:
    """The pair that one entry of labels.json describes; ValueError, in words for a person, if it is of no use."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry is a {type(entry).__name__}, expected an object with img_name, edit_instruction")
    name, instruction = entry.get("img_name"), entry.get("edit_instruction")
    if not isinstance(name, str) or not name.strip("\0 "):
        raise ValueError("the entry has no img_name")
    if not isinstance(instruction, str):
        raise ValueError("the entry has no edit_instruction")
    if len(instruction) > LONGEST_INSTRUCTION:
        raise ValueError(f"the edit_instruction has {len(instruction):,} characters, more than {LONGEST_INSTRUCTION:,}")
    if not _is_unicode(instruction):
        raise ValueError("the edit_instruction is no text: it holds half a surrogate pair")
    # Links are followed, since data sets are made of them; a name is no way out of the data.
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ValueError("the img_name leads out of the folder that its labels.json lies in")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise ValueError("the img_name is no name of a file: it holds half a surrogate pair") from None
    path = folder / name
    if "\0" in name or not path.is_file():
        there = "\0" not in name and os.path.lexists(path)
        raise ValueError("the image is no regular file, or a link to none" if there else "the image file is missing")
    # Nothing is computed from the descriptions: copies without them lose nothing.
    texts = (entry.get(f"{side}_image_description") for side in ("left", "right"))
    left, right = (text if isinstance(text, str) and _is_unicode(text) else "" for text in texts)
    return Pair(str(path), left, right, instruction)


def _is_unicode(text: str) -> bool:
    """Whether every encoder and file can take it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_task(folder: Path, problems: Problems) -> Task | None:
    label_files = _label_files(folder)
    if not label_files:
        problems.add(folder.name, "labels.json", "there is none, neither in the task's folder nor one level below")
        return None
    pairs: dict[str, Pair] = {}
    for file in label_files:
        try:
            entries = _read_labels(file)
        except ValueError as error:
            problems.add(folder.name, str(file.relative_to(folder)), str(error))
            continue
        for number, entry in enumerate(entries):
            name = entry.get("img_name") if isinstance(entry, dict) else None
            shown = os.path.join(
                *file.parent.relative_to(folder).parts,
                str(PurePosixPath(name)).lstrip("/") if isinstance(name, str) and name else file.name,
            )
            try:
                pair = _pair(entry, file.parent)
            except (ValueError, OSError) as error:
                problems.add(folder.name, shown, f"{error} (entry {number} of {file.name})")
                continue
            # An analogy takes two different files: a file named twice would give b = a.
            if pair.file in pairs:
                problems.add(folder.name, shown, f"is listed again (entry {number} of {file.name}); the first counts")
                continue
            pairs[pair.file] = pair
    if len(pairs) < 2:
        problems.add(folder.name, "labels.json", f"{len(pairs)} usable pair(s), an analogy needs 2")
        return None
    return Task(printable(folder.name), str(folder), tuple(pairs.values()))


def read_tasks(root: str | os.PathLike, problems: Problems) -> list[Task]:
    """The usable tasks under `root`, by name. Image files are looked up, not opened.

    Adds to `problems`: labels.json absent, empty or malformed; entries without a file name or an instruction, or with
    broken text; names that lead out of their folder; missing images; a file listed twice; a task with fewer than two
    pairs. Folders whose name starts with a dot are no tasks.

    Raises:
      UserError: `root` is not a readable folder, or no task in it is usable.
    """
    root = Path(root)
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"the data folder {root} can't be listed ({error.strerror}); expected a folder with one "
            "sub-folder per task; check the path"
        ) from error
    tasks = []
    for folder in folders:
        try:
            task = _read_task(folder, problems)
        except OSError as error:
            problems.add(folder.name, "", f"the folder could not be read: {error.strerror}")
            continue
        if task:
            tasks.append(task)
    if not tasks:
        why = problems.summary() if len(problems) else "it has no sub-folders"
        raise UserError(
            f"no usable task in the data folder {root}; expected <task>/Group1/labels.json with two or "
            f"more image pairs; found: {why}"
        )
    return tasks


def read_pair(pair: Pair, tell: Callable[[str, str], object] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The pair's images (before, after), uint8 [h,w,3] each; the middle column of an odd width is left out.

    tell(path, what) reports what was left out of the file, such as further frames; by default it is printed.

    Raises:
      UserError: the file is missing, unreadable or only one pixel wide.
    """
    image = read_image(pair.file, tell)
    width = image.shape[1] // 2
    if not width:
        raise UserError(f"{pair.file} is 1 pixel wide; expected before | after side by side; replace the file")
    return image[:, :width], image[:, -width:]


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
        """The images a, a′, b, b′, uint8 [h,w,3], in the order after a reversal; raises as `read_pair` does."""
        (a, a2), (b, b2) = read_pair(self.first), read_pair(self.second)
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
                [task.name, *([task.relative(pair), pair.instruction, _size(pair.file)] for pair in task.pairs)]
            ).encode()
        )
    return digest.hexdigest()[:16]


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1


def _stride(count: int) -> int:
    """A number near 0.618·count that shares no factor with it, so that its multiples mod count visit everything."""
    stride = max(1, round(count * (math.sqrt(5) - 1) / 2))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride
