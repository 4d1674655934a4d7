"""A table of image files: csv, jsonl or parquet with the columns of data/rows.py, before and after being paths.

Paths are relative to the table's folder and don't lead out of it.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.common.user_files import inside, read_text, regular_file
from lorweb_jax.data.analogies import Task
from lorweb_jax.data.extras import extra
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.rows import AFTER, BEFORE, COLUMNS, Row, read_rows
from lorweb_jax.data.two_files import TwoFiles

BYTES = 1_000_000_000  # of a csv or jsonl table


def read_tasks(table: Path, problems: Problems) -> list[Task]:
    """The tasks of a table's rows; without a column `task` all rows are one, called as the table. Image files are
    looked up, not opened.

    Adds to `problems`: rows that can't be parsed, without an image, without a caption where others have one; paths that
    lead out of the folder; missing images; a pair listed twice; a task with fewer than two pairs.

    Raises UserError if the table can't be read or lacks columns.
    """
    regular_file(table, "give the table's path")
    rows = KINDS[table.suffix.lower()](table, functools.partial(problems.add, table.stem))
    return read_rows(rows, table, functools.partial(_pair, table), problems)


def _pair(table: Path, row: Row, instruction: str) -> TwoFiles:
    before, after = (_file(table, row.values.get(side), side) for side in (BEFORE, AFTER))
    return TwoFiles(before, after, instruction)


def _file(table: Path, name: Any, column: str) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"the row has no path in the column {column}")
    path = inside(table.parent, name, "the row")
    if not path.is_file():
        raise ValueError(f"there is no image file {name}, looked for in the folder of {table.name}")
    return str(path)


Report = Callable[[str, str], object]  # (row, reason)


def _csv(table: Path, report: Report) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(table, BYTES), newline=""), strict=True)
    try:
        for values in reader:
            if None in values:
                report(f"{table.name} line {reader.line_num}", "has more values than the first line has columns")
            else:
                # An empty cell is nothing.
                yield Row(f"{table.name} line {reader.line_num}", {name: text or None for name, text in values.items()})
    except csv.Error as error:
        raise UserError(
            f"{table} is no csv with commas between its values (line {reader.line_num}: {error}); write it again, or "
            "as jsonl"
        ) from None


def _jsonl(table: Path, report: Report) -> Iterator[Row]:
    for number, line in enumerate(read_text(table, BYTES).split("\n"), 1):
        where = f"{table.name} line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            report(where, f"is not valid JSON: {error}")
            continue
        if isinstance(values, dict):
            yield Row(where, values)
        else:
            report(where, f"holds a {type(values).__name__}, expected an object with {', '.join(COLUMNS)}")


def _parquet(table: Path, report: Report) -> Iterator[Row]:
    parquet = extra("pyarrow.parquet", "parquet", f"to read {table}")
    try:
        with parquet.ParquetFile(table) as file:
            columns = [name for name in file.schema_arrow.names if name in COLUMNS] or file.schema_arrow.names
            rows = file.read(columns).to_pylist()
    except Exception as error:  # pyarrow's own, and Python's, for all kinds of damage
        raise UserError(
            f"{table} is no intact parquet file ({printable(str(error).strip(), 200)}); write it again"
        ) from None
    for number, values in enumerate(rows, 1):
        yield Row(f"{table.name} row {number}", values)


KINDS: dict[str, Callable[[Path, Report], Iterator[Row]]] = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
