"""Analogies to be evaluated: of data in any layout of docs/data.md, or of folders by category and instruction."""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data import folders
from lorweb_jax.data.analogies import Analogies, Analogy, Pair, Task
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems, reason
from lorweb_jax.images.grid import fit_to_model, other_shape, quadrants, target_grid
from lorweb_jax.images.io import WRITTEN, read_image

BATCH = 16  # images of one size that a model is given at once
STRETCHED = "its images have another shape than those of the first pair, to which they are stretched"
_SUFFIXES = (*WRITTEN, ".gif", ".avif", ".ppm")
# What the four images of a triplet are called, alone or after an id and a separator: 07_a.png, 07_a2.png, …
_ROLE = re.compile(r"(?:(?P<id>.*?)[_\-. ]+)?(?P<letter>[ab])(?P<after>2|p|'|′|[_\- ]?(?:prime|after|edited))?", re.I)


@dataclass(frozen=True, eq=False)
class Sample:
    """An analogy with its true answer: uint8 images [h, w, 3] of one size, the quadrants of the grid.

    b2 is None where the truth isn't known. split: which part of the data it is of, such as "unseen tasks". key: what
    tells it from all others of the split, the same wherever the data lie.
    """

    task: str
    caption: str
    a: np.ndarray
    a2: np.ndarray
    b: np.ndarray
    b2: np.ndarray | None
    split: str = ""
    key: str = ""

    @property
    def condition(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a method may see beside the caption."""
        return self.a, self.a2, self.b

    @property
    def truth(self) -> np.ndarray:
        """b2; ValueError where it isn't known."""
        if self.b2 is None:
            raise ValueError(f"the truth of {self.key} isn't known")
        return self.b2

    @property
    def id(self) -> str:
        """A file's name for it, without suffix."""
        words = re.sub(r"[^\w]+", "_", self.task, flags=re.ASCII).strip("_")[:40]
        return f"{words}-{_hash(self.split, self.key)[:12]}"

    @property
    def noise_seed(self) -> int:
        """0 to 2³² − 1, of its key alone."""
        return int(_hash(self.key)[:8], 16)

    def digest(self) -> str:
        """A short hash of the images and the caption."""
        parts = [fingerprint.of_image(image) for image in (*self.condition, self.b2) if image is not None]
        return fingerprint.of_text(" ".join([*parts, self.caption]))[:16]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()


def read_folder(
    root: str | Path, per_task: int, problems: Problems, max_size: int | None = None, split: str = ""
) -> list[Sample]:
    """The samples of data in a layout of docs/data.md, or of <category>/<instruction>/ with images a, a2, b and b2.

    What can't be used goes into `problems`. Raises UserError if nothing in the folder can be evaluated.
    """
    root = Path(root)
    if _has_categories(root):
        samples = _read_categories(root, per_task, problems, max_size)
    else:
        samples = read_samples(read_tasks(root, problems), per_task, problems, max_size)
    return [replace(sample, split=split) for sample in samples]


def _has_categories(root: Path) -> bool:
    """Whether there are triplets two folders down, and nothing by which another layout is known."""
    if not root.is_dir() or any(root.glob("*/labels.json")) or any(root.glob("*/*/labels.json")):
        return False
    if any(folders.is_task(folder) for folder in (root, *root.glob("*/"))):
        return False
    return any(_triplets(folder) for folder in root.glob("*/*") if folder.is_dir())


def _read_categories(root: Path, per_task: int, problems: Problems, max_size: int | None) -> list[Sample]:
    """<category>/<instruction>/ with images a, a2, b and, where the truth is known, b2; or a folder for each four, or
    an id before each name. The instruction is the folder's name, or what instruction.txt in it says."""
    samples = []
    for folder in sorted(path for path in root.glob("*/*") if path.is_dir()):
        task = printable(f"{folder.parent.name}/{folder.name}")
        caption = folder.name.replace("_", " ")
        if (folder / "instruction.txt").is_file():
            caption = (folder / "instruction.txt").read_text(encoding="utf-8", errors="replace").strip()
        count = 0
        for name, files in _triplets(folder).items():
            if count == per_task:
                break
            where = name or "."
            if missing := [role for role in ("a", "a2", "b") if role not in files]:
                problems.add(task, where, f"has no image {', '.join(missing)}")
                continue
            truth = None
            if "b2" not in files:
                problems.add(task, where, "has no image b2: it is evaluated without a truth")
            else:
                try:
                    truth = read_image(files["b2"], problems.tell)
                except UserError as error:
                    problems.add(task, where, f"{error}; it is evaluated without a truth")
            try:
                a, a2, b = (read_image(files[role], problems.tell) for role in ("a", "a2", "b"))
                images = _fitted(a, a2, b, truth, max_size)
            except Exception as error:  # whatever is wrong with one image, the others are read
                problems.add(task, where, reason(error))
                continue
            if any(other_shape(image.shape[1::-1], a.shape[1::-1]) for image in (a2, b)):
                problems.tell(str(folder / where), STRETCHED)
            samples.append(Sample(task, caption, *images, key=f"{task} {where}"))
            count += 1
        if not count:
            problems.add(task, "", "no usable triplet; expected images named a, a2, b and b2")
    if not samples:
        raise UserError(
            f"no triplet in the data folder {root} can be read; expected <category>/<instruction>/ with images named "
            f"a, a2, b and b2; {problems.summary()}"
        )
    return samples


def _triplets(folder: Path) -> dict[str, dict[str, Path]]:
    """{sub-folder and id: {"a", "a2", "b", "b2": file}}, as far as they are there."""
    triplets: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.rglob("*")):
        match = _ROLE.fullmatch(file.stem)
        if match and file.suffix.lower() in _SUFFIXES and file.is_file():
            inside = file.parent.relative_to(folder)
            name = "/".join(part for part in (*inside.parts, match["id"]) if part)
            role = match["letter"].lower() + ("2" if match["after"] else "")
            triplets.setdefault(name, {}).setdefault(role, file)
    return triplets


def _fitted(a, a2, b, b2, max_size: int | None) -> tuple:
    """The quadrants as the model gets them; the fourth None where there is no truth."""
    grid, _ = fit_to_model(target_grid(a, a2, b, b if b2 is None else b2, max_size))
    images = quadrants(grid)
    return images if b2 is not None else (*images[:3], None)


def read_samples(tasks: Sequence[Task], per_task: int, problems: Problems, max_size: int | None = None) -> list[Sample]:
    """`per_task` analogies of each task, or all where there are fewer; the same ones at every call.

    Their images are the quadrants of the target grid as the model gets it: b and the edited images at a's size, the
    grid within `max_size` and at a multiple of 16 px. An analogy with a file that can't be used is replaced by
    another one of its task where there is one; the file goes into `problems`, the replacement is counted there.

    Raises UserError if `per_task` is below 1 or no analogy at all can be read.
    """
    samples, bad = [], set()
    for task, (chosen, spares) in zip(tasks, _candidates(tasks, per_task), strict=True):
        read = [_read(analogy, task, max_size, bad, problems) for analogy in chosen]
        lost = read.count(None)
        others = (_read(analogy, task, max_size, bad, problems) for analogy in spares if lost)
        replaced = list(itertools.islice((sample for sample in others if sample), lost))
        problems.substituted += len(replaced)
        samples += [sample for sample in read if sample] + replaced
    if not samples:
        raise UserError(
            f"no analogy of the data can be read; expected tasks with two readable images each; {problems.summary()}"
        )
    return samples


def _candidates(tasks: Sequence[Task], per_task: int) -> Iterator[tuple[list[Analogy], Iterator[Analogy]]]:
    """For each task the analogies chosen, spread over its pairs, and all others as spares."""
    spread, every = Analogies(tasks, per_task), Analogies(tasks)
    for number in range(len(tasks)):
        chosen = [spread[i] for i in spread.span(number)]
        yield chosen, (every[i] for i in every.span(number) if every[i] not in chosen)


def _read(analogy: Analogy, task: Task, max_size: int | None, bad: set[Pair], problems: Problems) -> Sample | None:
    """None if one of its pairs can't be used; that pair is then in `bad`, and reported."""
    if bad & {analogy.first, analogy.second}:
        return None
    pair = analogy.second
    try:
        b, b2 = pair.read(problems.tell)
        pair = analogy.first
        a, a2 = pair.read(problems.tell)
        # A grid can only be too small, and a sets its size: `pair` is the file at fault here too.
        images = _fitted(a, a2, b, b2, max_size)
        if any(other_shape(image.shape[1::-1], a.shape[1::-1]) for image in (a2, b, b2)):
            problems.tell(analogy.second.places[0], STRETCHED)
    except Exception as error:  # whatever is wrong with one image, the others are read
        bad.add(pair)
        problems.add(task.name, task.relative(pair), reason(error))
        return None
    key = f"{task.name} {task.relative(analogy.first)} {task.relative(analogy.second)}"
    return Sample(task.name, analogy.caption, *images, key=key)


def batches(images: Sequence[np.ndarray], largest: int = BATCH) -> Iterator[tuple[list[int], list[int]]]:
    """(indexes, the same padded): images of one size, at most `largest` at a time.

    The batches of a size are padded to one length, by repeating indexes, so that a model is compiled once for it.
    """
    by_size: dict[tuple, list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.shape, []).append(index)
    for indexes in by_size.values():
        length = -(-len(indexes) // -(-len(indexes) // largest))
        for start in range(0, len(indexes), length):
            chosen = indexes[start : start + length]
            yield chosen, (chosen * length)[:length]
