"""Tasks in the layout of Relation252K.

`<root>/<task>/<group>/labels.json` lists {img_name, left_image_description, right_image_description,
edit_instruction}; each image file is "before | after" side by side (method.md section 8). The group folder is
`Group1` in the original and has other names in copies, so every sub-folder that holds a labels.json counts, and the
task's own folder may hold it too. What can't be used is skipped and added to a `Problems`.
"""

import dataclasses
import json
import os
from pathlib import Path, PurePosixPath

import numpy as np

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.common.schema import INDEX_BYTES
from lorweb_jax.common.user_files import read_text
from lorweb_jax.data.analogies import Task, Tell, checked_instruction, file_bytes, file_changed, is_unicode
from lorweb_jax.data.problems import Problems
from lorweb_jax.images.io import image_size, read_image


@dataclasses.dataclass(frozen=True, slots=True)
class SideBySide:
    """Follows data/analogies.py's Pair. One image file "before | after": its path, what is seen left and right, the
    edit as an instruction. The middle column of an odd width is left out."""

    file: str
    left_description: str
    right_description: str
    instruction: str

    @property
    def places(self) -> tuple[str]:
        return (self.file,)

    def read(self, tell: Tell | None = None) -> tuple[np.ndarray, np.ndarray]:
        image = read_image(self.file, tell)
        width = self._half(image.shape[1])
        return image[:, :width], image[:, -width:]

    def size(self) -> tuple[int, int]:
        width, height = image_size(self.file)
        return self._half(width), height

    def _half(self, width: int) -> int:
        if width < 2:
            raise UserError(f"{self.file} is 1 pixel wide; expected before | after side by side; replace the file")
        return width // 2

    def nbytes(self) -> tuple[int]:
        return (file_bytes(self.file),)

    def changed(self) -> int:
        return file_changed(self.file)


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


def _pair(entry, folder: Path) -> SideBySide:
    """The pair that one entry of labels.json describes; ValueError, in words for a person, if it is of no use."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry is a {type(entry).__name__}, expected an object with img_name, edit_instruction")
    name, instruction = entry.get("img_name"), entry.get("edit_instruction")
    if not isinstance(name, str) or not name.strip("\0 "):
        raise ValueError("the entry has no img_name")
    instruction = checked_instruction(instruction, "edit_instruction")
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
    left, right = (text if isinstance(text, str) and is_unicode(text) else "" for text in texts)
    return SideBySide(str(path), left, right, instruction)


def read_task(folder: Path, problems: Problems) -> Task | None:
    """The task in a folder, if it is usable. Image files are looked up, not opened.

    Adds to `problems`: labels.json absent, empty or malformed; entries without a file name or an instruction, or with
    broken text; names that lead out of their folder; missing images; a file listed twice; a task with fewer than two
    pairs. Raises OSError where the folder can't be listed.
    """
    label_files = _label_files(folder)
    if not label_files:
        problems.add(
            folder.name,
            "labels.json",
            "there is none, neither in the task's folder nor one level below, and no before and after",
        )
        return None
    pairs: dict[str, SideBySide] = {}
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
