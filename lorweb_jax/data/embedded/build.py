"""The embedded data set: analogies built at first run from real drawings, in Relation252K's layout (method.md §8)."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.locks import locked
from lorweb_jax.data.embedded.drawings import SIDE, Drawings, load_drawings
from lorweb_jax.data.embedded.operations import HELD_OUT_TASKS, TRAINING_TASKS, Operation, on_white, operation
from lorweb_jax.images.io import write_image

KEY_FILE = "embedded.json"
# Incremented when the same arguments would give other files than before.
FORMAT = 1


class EmbeddedDataset(NamedTuple):
    """The three roots. Held-out tasks are shown on held-out drawings, so that nothing about them was ever seen."""

    train: Path
    heldout_tasks: Path
    heldout_drawings: Path


def embedded_dataset(cache: str | Path, size: int = SIDE) -> EmbeddedDataset:
    """The data set of drawings of `size` pixels, in a folder of its own below `cache`; see build_embedded_dataset."""
    return build_embedded_dataset(Path(cache) / f"embedded_{size}px", Path(cache) / "drawings", size)


def build_embedded_dataset(
    folder: str | Path, cache_folder: str | Path, size: int = SIDE, pairs_per_task: int = 40, seed: int = 0
) -> EmbeddedDataset:
    """Write the data set below `folder` unless it is there; returns its roots.

    Each file is "before | after", `size` pixels high and 2·size wide; a task holds `pairs_per_task` drawings (or as
    many as there are). The same arguments give the same files; others replace what an earlier call wrote. A killed
    build leaves nothing behind in `folder`. Raises UserError for fewer than 2 pairs a task, or when `folder` holds
    something else.
    """
    folder = Path(folder).absolute()
    if pairs_per_task < 2:
        raise UserError(f"{pairs_per_task} pairs a task were asked for, an analogy needs at least 2; ask for more")
    roots = EmbeddedDataset(*(folder / name for name in EmbeddedDataset._fields))
    key = {
        "format": FORMAT,
        "size": size,
        "pairs_per_task": pairs_per_task,
        "seed": seed,
        "training_tasks": list(TRAINING_TASKS),
        "held_out_tasks": list(HELD_OUT_TASKS),
    }
    write_once(folder, key, lambda partial: _build(partial, load_drawings(cache_folder, size), pairs_per_task, seed))
    return roots


def write_once(folder: Path, key: dict[str, Any], build: Callable[[Path], object]) -> None:
    """Has `build` write a data set, unless `folder` holds the one that `key` describes; another one is replaced.

    build(partial) writes into a folder beside it, which is renamed when it is complete; processes wait for each other.
    Raises UserError when `folder` holds something else.
    """
    if _is_built(folder, key):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), wait=True):  # another process may be building it
        if not _is_built(folder, key):
            partial = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(partial, ignore_errors=True)  # what a killed build left
            build(partial)
            (partial / KEY_FILE).write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)


def _is_built(folder: Path, key: dict) -> bool:
    """Whether `folder` holds this very data set; UserError if it holds something that isn't ours to replace."""
    if not folder.exists():
        return False
    try:
        return json.loads((folder / KEY_FILE).read_text(encoding="utf-8")) == key
    except (OSError, ValueError, RecursionError):
        if folder.is_dir() and not any(folder.iterdir()):
            return False
        raise UserError(
            f"{folder} holds something else than an embedded data set, an empty or new folder was "
            "expected; choose another folder or remove it"
        ) from None


def _build(folder: Path, drawings: Drawings, pairs_per_task: int, seed: int) -> None:
    seen, unseen = drawings.part(held_out=False), drawings.part(held_out=True)
    for root, tasks, chosen in zip(
        EmbeddedDataset._fields, (TRAINING_TASKS, HELD_OUT_TASKS, TRAINING_TASKS), (seen, unseen, unseen), strict=True
    ):
        for number, task in enumerate(tasks):
            random = np.random.default_rng([seed, EmbeddedDataset._fields.index(root), number])
            indices = random.permutation(len(chosen))[:pairs_per_task]
            edit = operation(task)
            write_task(folder / root / task / "Group1", edit.instruction, edited(edit, chosen, indices))


class Drawn(NamedTuple):
    """A pair of a task: its file's name, uint8 images [h, w, 3] of one size, what they show."""

    file: str
    before: np.ndarray
    after: np.ndarray
    left: str
    right: str


def edited(edit: Operation, drawings: Drawings, indices: Iterable[int]) -> Iterable[Drawn]:
    """Drawings on white, before and after an operation."""
    for index in indices:
        name, rgba = drawings.names[index], drawings.images[index]
        yield Drawn(f"{name.replace(' ', '_')}.png", on_white(rgba), edit.apply(rgba), name, f"{name} {edit.describe}")


def write_task(folder: Path, instruction: str, pairs: Iterable[Drawn]) -> None:
    """`folder`, of a task's group, in Relation252K's layout."""
    labels = []
    for pair in pairs:
        write_image(folder / pair.file, np.concatenate([pair.before, pair.after], 1))
        labels.append(
            {
                "img_name": pair.file,
                "left_image_description": pair.left,
                "right_image_description": pair.right,
                "edit_instruction": instruction,
            }
        )
    (folder / "labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
