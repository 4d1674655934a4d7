"""Opening files that users bring: regular ones only, no larger than expected, every failure one sentence."""

import os
import stat
from pathlib import Path, PurePosixPath

from lorweb_jax.common.errors import UserError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# How a file begins that isn't safetensors.
_BEGINNINGS = {
    b"GGUF": "a GGUF file, which tools/convert_flux_weights.py reads where it holds a FLUX transformer: convert it "
    "first",
    b"PK\x03\x04": "a zip archive or PyTorch's pickle (.ckpt, .pt, .bin): give the .safetensors file of the same model",
    **{
        bytes((0x80, version)): "a Python pickle (.ckpt, .pt, .bin): give the .safetensors file of the same model"
        for version in (2, 3, 4, 5)
    },
    b"version https://git-lfs": "a Git LFS pointer, which stands for the file: run git lfs pull, or download it again",
    b"<!": "a web page, such as a login or an error: download the file again",
    b"<html": "a web page, such as a login or an error: download the file again",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x89HDF": "an HDF5 file: give the .safetensors file of the same model",
    b"\x89PNG": "an image: give the file with the weights",
    b"\xff\xd8\xff": "an image: give the file with the weights",
    b'{"': "JSON text: give the file with the weights",
}


def regular_file(path: str | Path, remedy: str = "check the path") -> Path:
    """`path`, if a regular file (or a link to one) lies there; checked without opening it, since opening a pipe waits.

    Raises UserError if there is nothing, if it may not be looked at, or for a folder, pipe, device or socket.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise cannot_be_read(path, error) from None
    except ValueError:  # a NUL, or a character that no file name can hold
        raise UserError(f"{str(path)!r} can't be the name of a file; {remedy}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, a regular file was expected; {remedy}")
    return Path(path)


def read_bytes(path: str | Path, limit: int, remedy: str = "check the path") -> bytes:
    """All of a regular file of at most `limit` bytes. Raises UserError for any other, and where it can't be read."""
    path = regular_file(path, remedy)
    try:
        with open(path, "rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise cannot_be_read(path, error) from None
    if len(data) > limit:
        raise UserError(
            f"{path} has {max(len(data), path.stat().st_size):,} bytes, at most {limit:,} were expected; "
            "give the right file"
        )
    return data


def read_text(path: str | Path, limit: int, remedy: str = "check the path") -> str:
    """The same as text; UserError too where it isn't UTF-8."""
    data = read_bytes(path, limit, remedy)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}); download or write it again"
        ) from None


def inside(folder: str | Path, name: str, source: str | Path) -> Path:
    """The file `name` below `folder`, as the file `source` calls it.

    Raises UserError for an absolute name and one that leads out of the folder: a file that was downloaded must not say
    what else is read. Links are followed, since a hub's cache is made of them.
    """
    parts = PurePosixPath(name).parts
    if not name or len(name) > 1000 or "\0" in name or name.startswith("/") or ".." in parts or "\\" in name:
        raise UserError(
            f"{source} names the file {name[:100]!r}, which does not lie in its folder; only names of files "
            f"below {folder} were expected: correct it or download it again"
        )
    return Path(folder, name)


def cannot_be_read(path: str | Path, error: OSError) -> UserError:
    return UserError(f"{path} can't be read ({error.strerror or error}); check the path and its permissions")


def by_beginning(data: bytes) -> str | None:
    """What a file is that begins so, and what to do; None if unknown."""
    return next((what for start, what in _BEGINNINGS.items() if data.lstrip(b" \r\n\t").startswith(start)), None)
