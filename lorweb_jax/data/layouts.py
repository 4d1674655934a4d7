"""The tasks of a data set in any layout that is known (docs/data.md); what lies there says which it is.

| layout | what lies there | read by |
|---|---|---|
| Relation252K | folders with labels.json | relation252k.py |
| pairs of folders | folders with before/ and after/, or one such | folders.py |
| table | a .csv, .jsonl or .parquet file | tables.py |
| Hugging Face data set | a folder that datasets' save_to_disk left | saved.py |
| webdataset | .tar files, or one such | shards.py |
| ArrayRecord of tensorflow-datasets | tfds:NAME or tfds:NAME:DIR in the place of a path | stored.py |
"""

import os
from collections.abc import Callable
from pathlib import Path

from lorweb_jax.common.errors import UserError
from lorweb_jax.data import folders, relation252k, saved, shards, stored, tables
from lorweb_jax.data.analogies import Task
from lorweb_jax.data.problems import Problems


def read_tasks(root: str | os.PathLike, problems: Problems) -> list[Task]:
    """The usable tasks of a data set, by name. What can't be used goes into `problems`; images aren't decoded.

    Folders whose name starts with a dot are no tasks.

    Raises:
      UserError: `root` can't be read, has no known layout or no usable task, or its library isn't installed.
    """
    root = Path(root)
    tasks = (_of_its_own_kind(root) or _in_folders)(root, problems)
    if not tasks:
        raise UserError(
            f"no usable task in the data folder {root}; expected <task>/Group1/labels.json, or <task>/before and "
            f"<task>/after, with two or more image pairs, or another layout of docs/data.md; found: "
            f"{problems.summary() if len(problems) else _what_else(root)}"
        )
    return tasks


def _of_its_own_kind(root: Path) -> Callable[[Path, Problems], list[Task]] | None:
    """What reads a root that isn't a folder of tasks."""
    if str(root).startswith(stored.PREFIX):
        return stored.read_tasks
    if root.suffix.lower() in tables.KINDS and not root.is_dir():
        return tables.read_tasks
    if saved.is_saved(root):
        return saved.read_tasks
    return shards.read_tasks if shards.shards(root) else None


def _in_folders(root: Path, problems: Problems) -> list[Task]:
    try:
        subfolders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(
            f"the data folder {root} can't be listed ({error.strerror}); expected a folder with one "
            "sub-folder per task, a table or shards; check the path"
        ) from error
    tasks = []
    for folder in [root] if folders.is_task(root) else subfolders:
        try:
            task = (folders if folders.is_task(folder) else relation252k).read_task(folder, problems)
        except OSError as error:
            problems.add(folder.name, "", f"the folder could not be read: {error.strerror}")
            continue
        if task:
            tasks.append(task)
    return tasks


def _what_else(root: Path) -> str:
    """What lies in a folder without tasks."""
    names = sorted(path.name for path in root.iterdir() if path.suffix.lower() in tables.KINDS) if root.is_dir() else []
    return f"the table {names[0]}, which is read if its own path is given" if names else "it has no sub-folders"
