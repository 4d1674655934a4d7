"""Files that commands write: checked before the work, whole or not at all, never over what the user has.

Nothing here imports jax: a command asks `require_writable` before it loads anything.
"""

import contextlib
import itertools
import os
import shutil
import stat
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lorweb_jax.common.errors import UserError

_PROBE = bytes(4096)  # written and removed again, to see that a folder is writable


def require_writable(
    paths: Sequence[str | Path], inputs: Iterable[str | Path] = (), *, overwrite: bool = False, nbytes: int = 0
) -> None:
    """UserError, before any work, where one of the files could not be written or would take another's place.

    paths: files to be written; missing folders are made with them. inputs: what is read, which is never replaced; of a
    folder, its weights and config.yaml. overwrite: whether other existing files may be replaced. nbytes: size of all
    files together, roughly.
    """
    paths, inputs = [Path(path) for path in paths], list(inputs)
    names: dict[str, Path] = {}
    for path in paths:
        # Some file systems take names that differ in case, or in how accents are coded, for the same.
        same = unicodedata.normalize("NFC", os.path.abspath(path)).casefold()
        if same in names:
            raise UserError(
                f"two results would be written to {path}"
                f"{'' if names[same] == path else f' and {names[same]}, which differ in case only'}; "
                "rename one of the inputs, or make the results one by one",
                2,
            )
        names[same] = path
    for path in paths:
        require_free(path, inputs, overwrite=overwrite)
    for folder in dict.fromkeys(path.parent for path in paths):
        _probe([path for path in paths if path.parent == folder], nbytes)


def require_new_folder(folder: str | Path) -> None:
    """UserError unless `folder` is absent or empty, and writable."""
    folder = Path(folder)
    with told_if_unwritable(folder):
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists already and is not an empty folder; name another")
    _probe([folder / "results"], 0)


def require_free(path: str | Path, inputs: Iterable[str | Path] = (), *, overwrite: bool = False) -> None:
    """The checks of `require_writable` on one path, without writing anything."""
    path = Path(path)
    inputs = [
        file for source in map(Path, inputs) for file in [source, *source.glob("*.safetensors"), *source.glob("*.yaml")]
    ]
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return  # a file in a folder's place: _probe tells
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path} is a folder, a file is to be written; give a file's name", 2)
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a device or a pipe, and results go into files; give a file's name", 2)
    for source in inputs:
        with contextlib.suppress(OSError, ValueError):
            if os.path.samestat(status, os.stat(source)):
                raise UserError(
                    f"the result would replace {source}, which is one of the inputs"
                    f"{'' if Path(source) == path else f' (as {path})'}; give another name or folder",
                    2,
                )
    if not overwrite:
        raise UserError(f"{path} exists already; give another name, or add --overwrite to replace it", 2)


def _probe(paths: list[Path], nbytes: int) -> None:
    """Write a small file beside the files of one folder and remove it again, with the folders created for it."""
    for _ in range(10):
        with contextlib.suppress(FileNotFoundError):  # another process has just taken its own folder away
            free = _tried(paths)
            break
    else:
        raise UserError(f"{paths[0]} could not be written, for its folder comes and goes; give another folder")
    if nbytes > free:
        raise UserError(
            f"{paths[0].parent} has {free / 1e9:.2f} GB free, and {nbytes / 1e9:.2f} GB are needed; make room "
            "or write elsewhere"
        )


def _tried(paths: list[Path]) -> int:
    """Bytes that are free where files of one folder will be written; FileNotFoundError if it vanishes meanwhile."""
    new_folders: list[Path] = []
    path = paths[0]
    try:
        missing = []
        folder = Path(os.path.realpath(path)).parent
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            new_folders.append(folder)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                path.lstat()  # a name that is too long, now that its folder is there
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".partial") as file:
            file.write(_PROBE)
            file.flush()
            os.fsync(file.fileno())
        return shutil.disk_usage(folder).free
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from None
    finally:
        for folder in reversed(new_folders):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _not_writable(path: Path, error: OSError | ValueError) -> UserError:
    if isinstance(error, FileExistsError | NotADirectoryError):
        there = next((parent for parent in path.parents if os.path.lexists(parent)), path.parent)
        kind = "a file and no folder" if there.is_file() else "no folder"
        return UserError(f"{path} could not be written, for {there} is {kind}; give another folder", 2)
    return UserError(
        f"{path} could not be written ({getattr(error, 'strerror', None) or error}); check the folder, its "
        "permissions and the free space"
    )


@contextlib.contextmanager
def told_if_unwritable(path: str | Path) -> Iterator[None]:
    """Within it, a failure to write `path` is a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):  # a NUL in the name
            raise
        raise _not_writable(Path(path), error) from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to `path` if the body succeeds and removed if not.

    Makes missing folders. Where `path` is a link, the file that it names is replaced. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of its own process, so that two that write the same file don't mix; names are limited to 255 bytes.
    start = os.fsdecode(os.fsencode(path.name)[:200])
    temporary = path.with_name(f"{start}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(folder: str | Path) -> Iterator[Path]:
    """The same of a folder, whole or not at all; an earlier one is removed when the new one has its name."""
    folder = Path(folder)
    new, earlier = (folder.with_name(f"{folder.name}.{os.getpid()}.{state}") for state in ("partial", "earlier"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(earlier)
        try:
            new.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise
    finally:
        for left in (new, earlier):
            shutil.rmtree(left, ignore_errors=True)


def write_file(path: str | Path, data: bytes, overwrite: bool = True) -> Path:
    """Write `data` under a temporary name, then rename; makes missing folders. Raises UserError if it can't.

    Returns the path: with `overwrite` False, name-1.suffix and so on where something of this name has come to be there.
    """
    with told_if_unwritable(path):
        path = Path(path) if overwrite else _claimed(Path(path))
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
        except BaseException:
            if not overwrite:
                Path(os.path.realpath(path)).unlink(missing_ok=True)
            raise
    return path


def _claimed(path: Path) -> Path:
    """An empty file of this name, or of the next one that is free, made now so that no other process takes it.

    Where the name is a link to a file that isn't there, this file is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        free = path.with_stem(f"{path.stem}-{number}") if number else path
        target = Path(os.path.realpath(free))
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            open(target, "xb").close()
            return free
    raise AssertionError("itertools.count() ended")


def write_text(path: str | Path, text: str) -> None:
    """The same of a text, as UTF-8. What UTF-8 doesn't have (names of files in other encodings) is written \\udc..,
    which JSON reads back as it was."""
    write_file(path, text.encode(errors="backslashreplace"))
