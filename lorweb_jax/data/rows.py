"""Tasks of rows, as tables, Hugging Face data sets and webdataset shards have them.

A row has an image before and one after an edit, and may have a caption and the task's name; without a name all rows are
one task, called as the table or folder. Either all rows have a caption or none: one without, where others have one,
is a problem and left out.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data.analogies import Pair, Task, Tell, checked_instruction, usable_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.images.io import decode_image, encoded_size

BEFORE, AFTER, CAPTION, TASK = COLUMNS = ("before", "after", "caption", "task")


class Row(NamedTuple):
    """where: the row as reports call it. values: what it holds by column; None, or no such key, for nothing."""

    where: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class RowPair:
    """Follows data/analogies.py's Pair: a row of a data set in `folder`, the sizes of its images as files (bytes), and
    the edit as an instruction. Kinds of data sets add `changed` and how the files are read."""

    folder: str
    row: int
    sizes: tuple[int, int]
    instruction: str

    @property
    def places(self) -> tuple[str]:
        return (f"{self.folder}/row {self.row}",)

    def read(self, tell: Tell | None = None) -> tuple[np.ndarray, np.ndarray]:
        sides = (BEFORE, AFTER)
        before, after = (decode_image(data, self._name(side), tell) for side, data in zip(sides, self._files(*sides)))
        return before, after

    def size(self) -> tuple[int, int]:
        [data] = self._files(BEFORE)
        return encoded_size(data, self._name(BEFORE))

    def _name(self, side: str) -> str:
        return f"{self.places[0]} {side}"

    def _files(self, *sides: str) -> list[bytes]:
        raise NotImplementedError

    def nbytes(self) -> tuple[int, int]:
        return self.sizes


def read_rows(rows: Iterable[Row], source: Path, make: Callable[[Row, str], Pair], problems: Problems) -> list[Task]:
    """The usable tasks of what lies at `source`, by name. Raises UserError if there is no row with both images.

    make(row, instruction) makes the pair, and raises UserError, ValueError or OSError, which goes into `problems`,
    where it can't.
    """
    rows = list(rows)
    _require_columns(rows, source)
    name, folder = (source.name, source) if source.is_dir() else (source.stem, source.parent)
    captions = any(row.values.get(CAPTION) is not None for row in rows)
    pairs: dict[str, list[Pair]] = {}
    for row in rows:
        task = name
        try:
            task = _task(row, name)
            text = row.values.get(CAPTION)
            if captions and text is None:
                raise ValueError("the row has no caption, while others have one")
            pair = make(row, checked_instruction(text if captions else "", CAPTION))
        except (UserError, ValueError, OSError) as error:
            problems.add(task, row.where, str(error))
        else:
            pairs.setdefault(task, []).append(pair)
    return usable_tasks(pairs, str(folder), problems)


def _task(row: Row, name: str) -> str:
    task = row.values.get(TASK)
    if task is None:
        return name
    if not isinstance(task, str | int) or not str(task).strip():
        raise ValueError("the row's task is no name; give a text or a number")
    return printable(str(task))


def _require_columns(rows: list[Row], source: Path) -> None:
    if not rows:
        raise UserError(f"{source} has no rows; expected two or more, each with {BEFORE} and {AFTER}")
    if not any(row.values.get(BEFORE) is not None and row.values.get(AFTER) is not None for row in rows):
        columns = ", ".join(printable(str(name), 40) for name in rows[0].values) or "none"
        raise UserError(
            f"no row of {source} has both {BEFORE} and {AFTER}; its columns are {columns}: rename them to "
            f"{BEFORE}, {AFTER}, and {CAPTION} and {TASK} where there are such"
        )
