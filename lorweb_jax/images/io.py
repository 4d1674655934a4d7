"""Images from and to files, as uint8 [H,W,3] sRGB in 0..255."""

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.outputs import write_file
from lorweb_jax.images.arrays import MAX_PIXELS, as_image
from lorweb_jax.images.convert import to_rgb

# What is read. Pillow knows many more formats, of which some run an interpreter or another program.
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
# {suffix: format} of what is written, and the longest side that a format has room for, pixels.
WRITTEN = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_LONGEST = {"JPEG": 65_500, "WEBP": 16_383}
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ours comes first, as an error

# {how a file begins: what it is}, of formats that people take for pictures of a kind that any program reads.
_KNOWN = {
    b"%!PS": "an EPS or PostScript file",
    b"%PDF": "a PDF",
    b"8BPS": "a Photoshop file",
    b"<svg": "an SVG drawing",
    b"<?xml": "an SVG drawing or another XML file",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"\0\0\0\x0cjP  ": "a JPEG 2000 image",
    b"v/1\x01": "an OpenEXR image",
}


def read_image(path: str | Path, tell: Callable[[str, str], object] | None = None) -> np.ndarray:
    """The image of a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or PPM file as uint8 [H,W,3], sRGB.

    Turned as its EXIF data asks, 16 bits scaled to 8, colours of an embedded profile converted to sRGB, transparent
    parts laid on white; of several frames the first. tell(path, what) reports what was left out; by default it is
    printed. Raises UserError for a file that is missing, damaged, no image, larger than MAX_PIXELS, or of samples
    whose range isn't known.
    """
    path = _checked(path)
    with _sentences(path, lambda: _beginning(path)):
        _require_file(path)
        with open(path, "rb") as file:
            return _pixels(file, str(path), lambda: Image.open(path, formats=READ), tell)


def decode_image(data: bytes, name: str, tell: Callable[[str, str], object] | None = None) -> np.ndarray:
    """The same of a file's content, which errors and `tell` call `name`."""
    with _sentences(name, lambda: data[:32]):
        return _pixels(io.BytesIO(data), name, lambda: Image.open(io.BytesIO(data), formats=READ), tell)


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of an image as `read_image` turns it, pixels, from the file's header alone.

    Raises UserError as `read_image` does where the header tells.
    """
    path = _checked(path)
    with _sentences(path, lambda: _beginning(path)):
        _require_file(path)
        with open(path, "rb") as file:
            return _size(file, str(path))


def encoded_size(data: bytes, name: str) -> tuple[int, int]:
    """The same of a file's content, which errors call `name`."""
    with _sentences(name, lambda: data[:32]):
        return _size(io.BytesIO(data), name)


def encoded_png(image: np.ndarray) -> bytes:
    """uint8 [h, w, 3] as a PNG file's content."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _checked(path: str | Path) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"an image's path is a {type(path).__name__}, a str or Path was expected; images that are in "
            "memory need no reading"
        )
    return Path(path)


def _require_file(path: Path) -> None:
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise UserError(f"{path} is a device or a pipe, an image file was expected; copy it into a file first")


def _require_few_pixels(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{name} has {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} in all were "
            "expected; make it smaller first"
        )


def _pixels(
    file: BinaryIO, name: str, again: Callable[[], ImageFile.ImageFile], tell: Callable[[str, str], object] | None
) -> np.ndarray:
    notes: list[str] = []
    with Image.open(file, formats=READ) as image:
        _require_few_pixels(image, name)
        if _frames(image) > 1:
            notes.append("it holds several frames or pages; the first one is taken")
        pixels = to_rgb(image, notes, again)
    for note in notes:
        tell(name, note) if tell else say(f"{name}: {note}")
    return pixels


def _size(file: BinaryIO, name: str) -> tuple[int, int]:
    with Image.open(file, formats=READ) as image:
        _require_few_pixels(image, name)
        with contextlib.suppress(Exception):  # damaged EXIF data, which reading leaves out too
            if image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                return image.height, image.width
        return image.size


@contextlib.contextmanager
def _sentences(name: str | Path, beginning: Callable[[], bytes]) -> Iterator[None]:
    """Whatever reading the image `name` raises becomes a UserError of one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(name) in str(error) else f"{name}: {error}") from None
    except FileNotFoundError:
        raise UserError(f"there is no image {name}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{name} is a folder, an image file was expected; name a file in it") from None
    except PermissionError:
        raise UserError(f"the image {name} may not be read; change its permissions or copy it") from None
    except UnidentifiedImageError:
        raise UserError(
            f"{name} is {_kind(beginning())}; give a PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF or PPM file"
        ) from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name} has far too many pixels, at most {MAX_PIXELS:,} were expected; make it smaller first"
        ) from None
    except Exception as error:  # on damaged files Pillow's readers raise nearly every kind of error
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"the image {name} could not be read ({error.strerror}); check the path") from None
        raise UserError(f"the image {name} is damaged ({error}); replace it by an intact copy") from None


def _frames(image: Image.Image) -> int:
    if image.format == "MPO":  # a phone's JPEG with a preview or a second view, which no program shows
        return 1
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a later frame is damaged, and not wanted
        return 2
    finally:
        image.seek(0)


def _beginning(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(32)


def _kind(start: bytes) -> str:
    """What a file is that begins so and isn't an image we read."""
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"hevc"):
        return "a HEIC photo"
    return next(
        (kind for magic, kind in _KNOWN.items() if start.startswith(magic)),
        "not an image in a known format" if start else "empty",
    )


def require_image_name(path: str | Path, size: tuple[int, int] | None = None) -> None:
    """UserError unless `path` has a suffix that images are written with, and room for `size` = (width, height)."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITTEN:
        raise UserError(
            f"{path} has the suffix {suffix or '(none)'}, one of {' '.join(WRITTEN)} was expected; rename it", 2
        )
    longest = _LONGEST.get(WRITTEN[suffix], max(size or [0]))
    if size and max(size) > longest:
        raise UserError(
            f"{path} would have {size[0]}x{size[1]} pixels, and a {WRITTEN[suffix]} file holds at most "
            f"{longest} a side; give a .png",
            2,
        )


def write_image(path: str | Path, image: np.ndarray, overwrite: bool = True, *, quality: int = 95) -> Path:
    """Write uint8 [H,W,3] in the format that the suffix says, whole or not at all; makes missing folders.

    A file of this name is replaced; with `overwrite` False a free name beside it is taken. `quality`, 1 to 100, is that
    of JPEG and WebP. Returns where the image is.
    Raises UserError for an unknown suffix, another kind of array, or when the file cannot be written.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"an image's path is a {type(path).__name__}, a str or Path was expected; give a file's name")
    image = as_image(image, "the image to write")
    require_image_name(path, image.shape[1::-1])
    kind = WRITTEN[Path(path).suffix.lower()]
    data = io.BytesIO()
    options = {"JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"quality": quality}}.get(kind, {})
    Image.fromarray(image).save(data, kind, **options)
    return write_file(path, data.getvalue(), overwrite)
