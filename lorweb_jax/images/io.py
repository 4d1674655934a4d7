"""Images from and to files, as uint8 [H,W,3] RGB in 0..255."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lorweb_jax.errors import UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF",
           ".tiff": "TIFF"}
MAX_PIXELS = 80_000_000                       # below Pillow's own limit; such a picture takes 240 MB in memory


def read_image(path: str | Path) -> np.ndarray:
    """The image of any usual file format as uint8 [H,W,3].

    The EXIF rotation is applied, transparent parts are laid on white, 16-bit grey is scaled to 8 bits. Raises
    UserError for a file that is missing, damaged, not an image or larger than MAX_PIXELS.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} in all were "
                                "expected; make it smaller first")
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image, path)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no image {path}; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, an image file was expected; name a file in it") from None
    except PermissionError:
        raise UserError(f"the image {path} may not be read; change its permissions or copy it") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image in a known format; give a PNG, JPEG or WebP file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path} has far too many pixels, at most {MAX_PIXELS:,} were expected; make it smaller "
                        "first") from None
    except Exception as error:                # on damaged files Pillow's readers raise nearly every kind of error
        raise UserError(f"the image {path} is damaged ({error}); replace it by an intact copy") from None


def _rgb(image: Image.Image, path: Path) -> np.ndarray:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    elif image.mode.startswith("I"):                                   # Pillow would clip 16 bits at 255
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"{path} has 32-bit grey values ({values.min()} to {values.max()}), 8 or 16 bits were "
                            "expected; save it with 8 bits a channel")
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, -1)
    elif image.mode == "F":
        raise UserError(f"{path} holds floating-point numbers of unknown range, 8 or 16 bits were expected; save it "
                        "with 8 bits a channel")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 [H,W,3] in the format that the suffix says, at once or not at all; makes missing folders.

    Raises UserError for an unknown suffix or when the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path} has the suffix {path.suffix or '(none)'}, one of {' '.join(FORMATS)} was expected; "
                        "rename it")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 [H,W,3], not {image.dtype} {list(image.shape)}")
    data = io.BytesIO()
    kind = FORMATS[path.suffix.lower()]
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    Image.fromarray(image).save(data, kind, **options)
    write_file(path, data.getvalue())


def write_file(path: str | Path, data: bytes) -> None:
    """Write `data` under a temporary name, then rename; makes missing folders. Raises UserError if it can't."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the folder, its permissions and the "
                        "free space") from None
