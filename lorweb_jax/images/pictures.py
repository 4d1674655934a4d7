"""Sheets of images with captions, pixel for pixel (PIL); small images are enlarged. plots.py draws figures."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorweb_jax.common.errors import printable
from lorweb_jax.images.io import write_image

MARGIN, LINE = 6, 14  # px around a cell; height of a line of the default font
SMALLEST = 96  # the longer edge that images have at least, by default, px


def _font():
    return ImageFont.load_default(size=11)


def _enlarged(image: np.ndarray, smallest: int) -> Image.Image:
    """uint8 [h, w, 3] -> PIL image, enlarged by a whole factor with hard edges."""
    factor = max(1, -(-smallest // max(image.shape[:2])))
    return Image.fromarray(np.repeat(np.repeat(image, factor, 0), factor, 1))


def _shortened(text: str, width: int) -> str:
    """As much of a text as fits into `width` px, on one line; the font has no prime: a and a' remain of a and a′."""
    font = _font()
    text = printable(text.replace("′", "'"), width)  # no character is as narrow as a pixel
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[: max(0, fitting - 1)] + "…"


def sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str] = (), smallest: int = SMALLEST
) -> np.ndarray:
    """Rows of (caption, images uint8 [h, w, 3]) under the columns' titles -> one picture uint8 [H, W, 3].

    Images are enlarged by a whole factor until their longer edge has at least `smallest` px.
    """
    pictures = [(caption, [_enlarged(image, smallest) for image in images]) for caption, images in rows]
    count = max(len(images) for _, images in pictures)
    widths = [max((images[i].width for _, images in pictures if i < len(images)), default=0) for i in range(count)]
    heights = [max(image.height for image in images) for _, images in pictures]
    total = max(sum(widths) + MARGIN * (count + 1), 240)
    top = LINE + MARGIN if columns else 0
    canvas = Image.new("RGB", (total, top + sum(heights) + (LINE + 2 * MARGIN) * len(pictures)), "white")
    draw = ImageDraw.Draw(canvas)
    lefts = [MARGIN + sum(widths[:i]) + MARGIN * i for i in range(count)]
    for left, width, title in zip(lefts, widths, columns):
        draw.text((left, 3), _shortened(title, width), fill="black", font=_font())
    y = top
    for (caption, images), height in zip(pictures, heights):
        draw.text((MARGIN, y), _shortened(caption, total - 2 * MARGIN), fill="black", font=_font())
        for left, image in zip(lefts, images):
            canvas.paste(image, (left, y + LINE + MARGIN // 2))
        y += height + LINE + 2 * MARGIN
    return np.asarray(canvas)


def save(folder: Path, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Write pictures uint8 [h, w, 3] as <folder>/<name>_<step>.png."""
    for name, image in images.items():
        write_image(folder / f"{name}_{step:06d}.png", image)
