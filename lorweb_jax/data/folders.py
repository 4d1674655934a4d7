"""A task as two folders, `before/` and `after/`, of images with equal names.

Names are compared without their suffix. The instruction of `before/cup.png` and `after/cup.jpg` is `cup.txt`, in the
task's folder or in either of the two; where there is none it is `caption.txt` in the task's folder, and empty in a task
without any text.
"""

from pathlib import Path

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.user_files import read_text
from lorweb_jax.data.analogies import LONGEST_INSTRUCTION, Task, checked_instruction, usable_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.two_files import TwoFiles

BEFORE, AFTER, CAPTION = "before", "after", "caption"


def is_task(folder: Path) -> bool:
    """Whether `folder` holds the two folders."""
    return (folder / BEFORE).is_dir() and (folder / AFTER).is_dir()


def read_task(folder: Path, problems: Problems) -> Task | None:
    """The task in a folder, if it is usable. Image files are looked up, not opened.

    Adds to `problems`: an image without a partner; two of one name and different suffixes; a text that can't be read;
    an image without a text where others of the task have one; a task with fewer than two pairs. Raises OSError where a
    folder can't be listed.
    """
    before, after = (_images(folder, side, problems) for side in (BEFORE, AFTER))
    for one, other, side in ((before, after, AFTER), (after, before, BEFORE)):
        for stem in sorted(one.keys() - other.keys()):
            file = one[stem].relative_to(folder)
            problems.add(folder.name, str(file), f"there is no image of the same name in {side}")
    stems = sorted(before.keys() & after.keys())
    texts = {stem: _text(folder, stem) for stem in stems}
    general = folder / f"{CAPTION}.txt"
    some = general.is_file() or any(texts.values())
    pairs = []
    for stem in stems:
        text = texts[stem] or (general if general.is_file() else None)
        try:
            instruction = _instruction(text, some)
        except (ValueError, UserError) as error:
            problems.add(folder.name, str((text or before[stem]).relative_to(folder)), str(error))
        else:
            pairs.append(TwoFiles(str(before[stem]), str(after[stem]), instruction))
    return next(iter(usable_tasks({folder.name: pairs}, str(folder), problems)), None)


def _images(folder: Path, side: str, problems: Problems) -> dict[str, Path]:
    """{name without suffix: file}; texts and hidden files are left out."""
    files: dict[str, Path] = {}
    for file in sorted((folder / side).iterdir()):
        if file.name.startswith(".") or file.suffix.lower() == ".txt" or not file.is_file():
            continue
        if file.stem in files:
            first = files[file.stem].name
            problems.add(
                folder.name, f"{side}/{file.name}", f"has the name of {first} but for its suffix, which counts"
            )
        files.setdefault(file.stem, file)
    return files


def _text(folder: Path, stem: str) -> Path | None:
    files = (place / f"{stem}.txt" for place in (folder, folder / AFTER, folder / BEFORE))
    return next((file for file in files if file.is_file()), None)


def _instruction(text: Path | None, some: bool) -> str:
    if text is not None:
        return checked_instruction(read_text(text, 4 * LONGEST_INSTRUCTION).strip(), "caption")
    if some:
        raise ValueError(
            f"there is no caption, while others of the task have one; write it, or a {CAPTION}.txt for all"
        )
    return ""
