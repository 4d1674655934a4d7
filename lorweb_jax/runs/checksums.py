"""SHA-256 of a checkpoint's files, so that flipped bits don't load as other weights; written before it is complete.

The list has the format of sha256sum, so that `sha256sum -c checksums.sha256` in a checkpoint's folder checks it, too.
"""

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "checksums.sha256"
ITEMS = ("state", "progress")  # what a checkpoint holds, a folder each
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\0]+)")


def write(folder: Path) -> None:
    """List the files of a checkpoint's items. Raises OSError."""
    files = sorted(path for item in ITEMS for path in (folder / item).rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as threads:
        sums = list(threads.map(_sum, files))
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for digest, path in zip(sums, files, strict=True)]
    (folder / FILE).write_text("".join(lines))


def damage(folder: Path, items: tuple[str, ...] = ITEMS) -> str | None:
    """What is wrong with a checkpoint's items, in words; None if nothing is, or if there is no list."""
    try:
        text = (folder / FILE).read_bytes().decode("ascii", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{FILE} can't be read ({error.strerror})"
    matches = [_LINE.fullmatch(line) for line in text.splitlines()]
    lines = [match for match in matches if match]
    if not lines or len(lines) < len(matches) or not text.endswith("\n"):
        return f"{FILE} is damaged itself"
    listed = [(line[2], line[1]) for line in lines if line[2].split("/")[0] in items]
    if {name.split("/")[0] for name, _ in listed} != {item for item in items if (folder / item).exists()}:
        return f"{FILE} lists other files"
    with ThreadPoolExecutor(4) as threads:
        results = threads.map(lambda name: _sum_or_problem(folder / name), [name for name, _ in listed])
        return next(
            (
                f"{name} {what if len(what) < 64 else 'differs from its checksum'}"
                for (name, expected), what in zip(listed, results, strict=True)
                if what != expected
            ),
            None,
        )


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_or_problem(path: Path) -> str:
    """The file's checksum, or why there is none."""
    try:
        return _sum(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
