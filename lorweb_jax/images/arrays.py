"""Images passed as arrays or PIL images: uint8 [H,W,3], or an error that says how to convert."""

from typing import Any

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.images.convert import to_rgb

MAX_PIXELS = 80_000_000  # below Pillow's own limit; such a picture takes 240 MB in memory


def as_image(value: Any, name: str) -> np.ndarray:
    """uint8 [H,W,3] of an array of just this kind, or of a PIL image of any mode (see images.convert).

    Raises UserError, which calls the image `name`, for everything else: its range or the order of its axes would have
    to be guessed.
    """
    if isinstance(value, Image.Image):
        notes: list[str] = []
        try:
            pixels = to_rgb(value, notes)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        except Exception as error:  # an image that was opened and not yet read, from a damaged file
            raise UserError(f"{name} could not be read ({error}); replace it by an intact copy") from None
        for note in notes:
            say(f"{name}: {note}")
        value = pixels
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        kind, advice = _described(value)
        raise UserError(f"{name} is {kind}, a uint8 array [H, W, 3] in 0..255 was expected; {advice}")
    if value.shape[0] * value.shape[1] > MAX_PIXELS:
        raise UserError(
            f"{name} has {value.shape[1]}x{value.shape[0]} pixels, at most {MAX_PIXELS:,} in all were expected; "
            "make it smaller first"
        )
    if not value.size:
        raise UserError(
            f"{name} has {value.shape[1]}x{value.shape[0]} pixels, at least one was expected; give an image"
        )
    return value


def _described(value: Any) -> tuple[str, str]:
    """(what it is, how to make an image of it)."""
    if isinstance(value, str | bytes) or hasattr(value, "__fspath__"):
        return f"a path or text ({str(value)[:80]!r})", "read it with read_image"
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            kind += f" {list(value.shape)} of {value.dtype}"
            return f"a {kind}", "make it a numpy array of uint8 [H, W, 3]"
        return f"a {kind}", "give a numpy array, or read a file with read_image"
    array = f"an array {list(value.shape)} of {value.dtype}"
    shape = value.shape
    if value.dtype == np.uint8:
        if value.ndim == 2:
            return array, "repeat the grey values with np.repeat(image[..., None], 3, -1)"
        if value.ndim == 3 and shape[2] == 4:
            return array, "lay it on a background, or leave its transparency out with image[..., :3]"
        if value.ndim == 3 and shape[2] == 1:
            return array, "repeat the grey values with np.repeat(image, 3, -1)"
        if value.ndim == 3 and shape[0] == 3:
            return array, "move the channels to the end with image.transpose(1, 2, 0)"
        return array, "give one image" + (" at a time, such as images[0]" if value.ndim == 4 else "")
    if value.dtype == np.bool_:
        return array, "scale it with image.astype('uint8') * 255"
    if value.dtype == np.uint16:
        return array, "scale it with (image / 257).round().astype('uint8')"
    if value.dtype.kind == "f" and np.isfinite(value).any():
        finite = value[np.isfinite(value)]
        low, high = float(finite.min()), float(finite.max())
        scale = "((image + 1) * 127.5)" if low < 0 else "(image * 255)" if high <= 1 else "image"
        return f"{array} from {low:.3g} to {high:.3g}", f"scale it with {scale}.round().clip(0, 255).astype('uint8')"
    return array, "give its values as uint8"
