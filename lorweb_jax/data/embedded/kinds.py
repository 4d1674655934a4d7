"""Kinds of analogies with a known truth, by what of them the default run trains on (docs/evaluation.md).

embedded:all       every kind, each a split of its own
embedded:people    one of them, by its key in KINDS
"""

import hashlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded.build import edited, embedded_dataset, write_once, write_task
from lorweb_jax.data.embedded.drawing_sets import load_sets
from lorweb_jax.data.embedded.drawings import SIDE, load_drawings
from lorweb_jax.data.embedded.operations import OPERATIONS, TRAINING_TASKS, Operation, composed
from lorweb_jax.data.embedded.people import REDRAWINGS, STYLE, Redrawn
from lorweb_jax.data.problems import Problems

EMBEDDED, ALL = "embedded", "all"
PACK = "drawings64.npz"  # tools/pack_drawings.py's file, in the cache
# Incremented when the same arguments would give other files than before.
FORMAT = 1
_PAIRS = 40  # of a task, or as many as there are

# Two operations that training shows each alone, the second on the first one's result.
COMPOSITIONS: dict[str, Operation] = {
    edit.name: edit
    for first, second in (
        ("background_yellow", "flip_sideways"),
        ("background_pink", "frame_blue"),
        ("tint_green", "dot_top_left"),
        ("tint_blue", "shift_right"),
        ("silhouette_red", "size_smaller"),
        ("outline_blue", "flip_over"),
        ("filter_gray", "frame_red"),
        ("filter_invert", "cross_red"),
        ("lines_pencil", "hide_left"),
        ("light_night", "dot_bottom_left"),
        ("soften_pixelate", "frame_green"),
        ("size_larger", "pattern_level"),
    )
    for edit in (composed(OPERATIONS[first], OPERATIONS[second]),)
}
_SEEN_FAMILIES = {OPERATIONS[name].family for name in TRAINING_TASKS}
_UNSEEN = [edit for edit in OPERATIONS.values() if edit.name not in TRAINING_TASKS]


class Kind(NamedTuple):
    """title: of its split in reports."""

    title: str
    tasks: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "seen": Kind("seen tasks", TRAINING_TASKS),
    "parameters": Kind(
        "new parameters of seen families", tuple(edit.name for edit in _UNSEEN if edit.family in _SEEN_FAMILIES)
    ),
    "families": Kind("unseen families", tuple(edit.name for edit in _UNSEEN if edit.family not in _SEEN_FAMILIES)),
    "compositions": Kind("unseen compositions", tuple(COMPOSITIONS)),
    "people": Kind("drawn by people", tuple(REDRAWINGS)),
}


def kind_folders(word: str, cache: str | Path, problems: Problems) -> list[tuple[str, Path]]:
    """(title, folder in Relation252K's layout) of each kind that "embedded:KIND" or "embedded:all" asks for.

    What is missing is built in `cache` first. Adds to `problems` the tasks whose drawings aren't there. Raises
    UserError for a word that names no kind.
    """
    name = word.removeprefix(f"{EMBEDDED}:")
    if name != ALL and name not in KINDS:
        raise UserError(f"{word} names no kind of analogies; give {EMBEDDED}: with {', '.join(KINDS)} or {ALL}", 2)
    chosen = list(KINDS) if name == ALL else [name]
    folders = {"seen": embedded_dataset(cache).heldout_drawings} if "seen" in chosen else {}
    if others := [kind for kind in chosen if kind != "seen"]:
        root = build_kinds(cache)
        folders |= {kind: root / kind for kind in others}
    if "people" in chosen and not (pack := Path(cache) / PACK).is_file():
        for task in (task for task, edit in REDRAWINGS.items() if edit.kind == STYLE):
            problems.add(task, str(pack), "the other sets' drawings are not there; `make local_data/drawings64.npz`")
    return [(KINDS[kind].title, folders[kind]) for kind in chosen]


def build_kinds(cache: str | Path, size: int = SIDE, pairs_per_task: int = _PAIRS) -> Path:
    """Write <cache>/kinds_<size>px/<kind>/<task>/ of all kinds but "seen", unless they are there; returns the folder.

    All drawings are held out from the basis's training (`Redrawn.pairs` says how those of people are). Tasks that need
    <cache>/drawings64.npz are left out where it isn't. Raises UserError where that file is damaged.
    """
    cache = Path(cache).absolute()
    folder, pack = cache / f"kinds_{size}px", cache / PACK
    key = {
        "format": FORMAT,
        "size": size,
        "pairs_per_task": pairs_per_task,
        "pack": hashlib.sha256(pack.read_bytes()).hexdigest() if pack.is_file() else None,
        "tasks": {kind: list(KINDS[kind].tasks) for kind in KINDS},
    }

    def build(partial: Path) -> None:
        held_out = load_drawings(cache / "drawings", size).part(held_out=True)
        operations = OPERATIONS | COMPOSITIONS
        for kind in ("parameters", "families", "compositions"):
            for task in KINDS[kind].tasks:
                edit, indices = operations[task], _random(task).permutation(len(held_out))[:pairs_per_task]
                write_task(partial / kind / task / "Group1", edit.instruction, edited(edit, held_out, indices))
        redrawn = Redrawn(load_sets(pack) if pack.is_file() else None, size)
        for task, edit in REDRAWINGS.items():
            pairs = redrawn.pairs(task, pairs_per_task, _random(task))
            if first := next(pairs, None):
                write_task(partial / "people" / task / "Group1", edit.instruction, itertools.chain([first], pairs))

    write_once(folder, key, build)
    return folder


def _random(task: str) -> np.random.Generator:
    """Of the task's name alone, so that a longer table leaves the others' pairs as they are."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(task.encode()).digest()[:4], "big"))
