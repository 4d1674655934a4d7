"""The image pair of Pair Customization, and its augmentation (method.md §7): one draw serves both images."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.resize import resize

# Landscape ratios that a draw chooses from; None leaves the ratio as it is.
RATIOS: dict[str, tuple[int, int] | None] = {"16:9": (16, 9), "as it is": None, "1:1": (1, 1), "4:3": (4, 3)}
AREA = (0.75, 1.0)  # share of the image's area that a crop keeps
MULTIPLE = 32  # both sides of what a crop is taken from are multiples of it, pixels
TRIES = 10


class Draw(NamedTuple):
    """ratio: a key of RATIOS. crop: top, left, height, width in the resized image, pixels. flip: left to right."""

    ratio: str
    crop: tuple[int, int, int, int]
    flip: bool


def draw(rng: np.random.Generator, shape: tuple[int, ...], long_edge: int) -> Draw:
    """A draw for an image of this shape [H, W, 3].

    The crop's area is uniform in AREA of the resized image's, its aspect is the drawn ratio (of "as it is": the image's
    own); where ten tries give none that fits, it is the largest centred crop of that aspect.
    """
    ratio = list(RATIOS)[rng.integers(len(RATIOS))]
    height, width = resized_shape(shape, ratio, long_edge)
    across, down = RATIOS[ratio] or (shape[1], shape[0])
    aspect = across / down
    crop = None
    for _ in range(TRIES):
        area = height * width * rng.uniform(*AREA)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            crop = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
            break
    return Draw(ratio, crop or largest_crop((height, width), aspect), bool(rng.random() < 0.5))


def largest_crop(shape: tuple[int, int], aspect: float) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the largest centred crop of this aspect = width / height."""
    height, width = shape
    if width / height < aspect:
        w, h = width, round(width / aspect)
    else:
        w, h = round(height * aspect), height
    return (height - h) // 2, (width - w) // 2, h, w


def augment(image: np.ndarray, drawn: Draw, long_edge: int) -> np.ndarray:
    """The image uint8 [H, W, 3] as the draw says: float32 [h, w, 3] in −1..1, sides multiples of MULTIPLE."""
    levels = resized(image, drawn.ratio, long_edge)
    height, width = levels.shape[:2]
    top, left, h, w = drawn.crop
    crop = levels[top : top + h, left : left + w]
    # Pillow resizes float32 one channel at a time.
    planes = [resize(crop[..., channel], (width, height), Image.Resampling.BILINEAR) for channel in range(3)]
    result = np.stack(planes, axis=-1)
    return np.ascontiguousarray(result[:, ::-1] if drawn.flip else result)


def resized(image: np.ndarray, ratio: str, long_edge: int) -> np.ndarray:
    """The image uint8 [H, W, 3] cut to the ratio and resized: float32 [h, w, 3] in −1..1."""
    left, top, right, bottom = _centred(image.shape, ratio)
    cut = image[top:bottom, left:right]
    for shape in _shapes(image.shape, ratio, long_edge):
        cut = resize(cut, shape[::-1])
    return cut.astype(np.float32) / np.float32(127.5) - np.float32(1)


def resized_shape(shape: tuple[int, ...], ratio: str, long_edge: int) -> tuple[int, int]:
    """(height, width) of what `resized` returns."""
    return _shapes(shape, ratio, long_edge)[-1]


def _centred(shape: tuple[int, ...], ratio: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the centred crop to a ratio."""
    height, width = shape[:2]
    chosen = RATIOS[ratio]
    if chosen is None:
        return 0, 0, width, height
    across, down = chosen
    if width * down > height * across:
        w, h = int(height * across / down), height
    else:
        w, h = width, int(width / (across / down))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _shapes(shape: tuple[int, ...], ratio: str, long_edge: int) -> list[tuple[int, int]]:
    """(height, width) after the first and after the second resize."""
    left, top, right, bottom = _centred(shape, ratio)
    width, height = right - left, bottom - top
    scale = long_edge / max(width, height)
    h, w = (long_edge if side == max(width, height) else int(side * scale) for side in (height, width))
    even = h // MULTIPLE * MULTIPLE, w // MULTIPLE * MULTIPLE
    if min(even) == 0:
        raise UserError(
            f"an image of {width}x{height} pixels, resized to a long edge of {long_edge}, has a side shorter than "
            f"{MULTIPLE} pixels; give a larger long edge or an image of another ratio"
        )
    return [(h, w), even]
