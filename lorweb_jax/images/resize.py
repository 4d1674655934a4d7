"""Resizing of images."""

import numpy as np
from PIL import Image

_PREMULTIPLIED = {"RGBA": "RGBa", "LA": "La"}  # so that colours of transparent pixels don't shine through


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
    box: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """To `size` = (width, height) by PIL's filter `resample`: uint8 [H, W], [H, W, 3] or [H, W, 4], float32 [H, W].

    box: (left, top, right, bottom) of the part that is resized, in pixels, fractions too; all of the image without it.

    The width first, then the height. Before Pillow 13 one call did so; it now takes the height first where only that
    shrinks, which rounds to other bytes, and recorded ones are reproduced on every Pillow.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    if (left, top, right, bottom) == (0, 0, *size) == (0, 0, width, height):
        return image
    picture = Image.fromarray(image)
    mode = picture.mode
    if mode in _PREMULTIPLIED and resample != Image.Resampling.NEAREST:
        picture = picture.convert(_PREMULTIPLIED[mode])
    picture = picture.resize((size[0], height), resample, (left, 0, right, height))
    picture = picture.resize(size, resample, (0, top, size[0], bottom))
    return np.asarray(picture.convert(mode) if picture.mode != mode else picture)
