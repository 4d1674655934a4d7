"""A data set of the Hugging Face library `datasets`, as `save_to_disk` leaves it, with the columns of data/rows.py."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.data.analogies import Task, file_changed
from lorweb_jax.data.extras import extra
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.rows import AFTER, BEFORE, CAPTION, TASK, Row, RowPair, read_rows

STATE, SPLITS = "state.json", "dataset_dict.json"


@dataclasses.dataclass(frozen=True, slots=True)
class SavedPair(RowPair):
    """A row of a data set that `datasets` saved."""

    def _files(self, *sides: str) -> list[bytes]:
        images = _opened(self.folder).select_columns(list(sides))[self.row]
        return [images[side]["bytes"] for side in sides]

    def changed(self) -> int:
        return file_changed(f"{self.folder}/{STATE}")


def is_saved(folder: Path) -> bool:
    """Whether `folder` is a data set that `datasets` saved, or several splits of one."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def read_tasks(folder: Path, problems: Problems) -> list[Task]:
    """The tasks of a data set's rows; without a column `task` all rows are one, called as the folder. Images aren't
    decoded.

    Adds to `problems`: rows without an image, without a caption where others have one; a task with fewer than two
    pairs. Raises UserError if the data set can't be read, has several splits or lacks columns, and where the library
    isn't installed.
    """
    if (folder / SPLITS).is_file():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{STATE}"))
        raise UserError(
            f"{folder} holds several splits of a data set ({', '.join(splits) or 'none of them intact'}); give the "
            f"folder of one, such as {folder / (splits[0] if splits else 'train')}"
        )
    return read_rows(_rows(folder), folder, functools.partial(_pair, folder), problems)


def _pair(folder: Path, row: Row, instruction: str) -> SavedPair:
    for side in (BEFORE, AFTER):
        if row.values.get(side) is None:
            raise ValueError(f"the row has no image in the column {side}")
    return SavedPair(str(folder), row.values["row"], (row.values[BEFORE], row.values[AFTER]), instruction)


def _rows(folder: Path) -> Iterator[Row]:
    """Of the images the sizes alone."""
    dataset = _opened(str(folder))
    texts = [name for name in (CAPTION, TASK) if name in dataset.column_names]
    columns: dict[str, Any] = {name: dataset.select_columns([name])[:][name] for name in texts}
    columns |= {side: _sizes(dataset, side) for side in (BEFORE, AFTER) if side in dataset.column_names}
    shown = columns or dict.fromkeys(dataset.column_names, [None] * len(dataset))
    for row in range(len(dataset)):
        yield Row(f"row {row}", {"row": row, **{name: values[row] for name, values in shown.items()}})


def _sizes(dataset: Any, side: str) -> list[int | None]:
    compute = extra("pyarrow.compute", "datasets", "to read a saved data set")
    images = dataset.with_format("arrow").select_columns([side])[:][side]
    return compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()


@functools.lru_cache(maxsize=16)
def _opened(folder: str) -> Any:
    """The data set, whose images are the bytes of files; opened once in each process."""
    datasets = extra("datasets", "datasets", f"to read {folder}")
    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_from_disk(folder)
        dataset.data.validate(full=True)  # offsets that lead out of a damaged file would end the process
    except Exception as error:  # the library's own, pyarrow's and Python's, for all kinds of damage
        raise UserError(
            f"{folder} is no intact data set of datasets ({printable(str(error).strip(), 200)}); save it again"
        ) from None
    for side in (BEFORE, AFTER):
        if side in dataset.column_names:
            if not isinstance(dataset.features[side], datasets.Image):
                raise UserError(
                    f"the column {side} of {folder} is {printable(str(dataset.features[side]), 80)}, images were "
                    "expected; cast it to datasets.Image() and save it again"
                )
            dataset = dataset.cast_column(side, datasets.Image(decode=False))
    return dataset
