"""Pictures of a run: rows of images with captions, labelled heat maps. Drawn with PIL, small images scaled up."""

import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lorweb_jax.common.errors import printable
from lorweb_jax.images.io import write_image

MARGIN, LINE = 6, 14  # px around a cell; height of a line of the default font
SMALLEST = 96  # images are enlarged by a whole factor until their longer edge is at least this, px


def _font():
    return ImageFont.load_default(size=11)


def _enlarged(image: np.ndarray) -> Image.Image:
    """uint8 [h, w, 3] -> PIL image, enlarged by a whole factor with hard edges."""
    factor = max(1, -(-SMALLEST // max(image.shape[:2])))
    return Image.fromarray(np.repeat(np.repeat(image, factor, 0), factor, 1))


def _shortened(text: str, width: int) -> str:
    """As much of a text as fits into `width` px, on one line; the font has no prime: a and a' remain of a and a′."""
    font = _font()
    text = printable(text.replace("′", "'"), width)  # no character is as narrow as a pixel
    if font.getlength(text) <= width:
        return text
    fitting = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[: max(0, fitting - 1)] + "…"


def sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: Sequence[str] = ()) -> np.ndarray:
    """Rows of (caption, images uint8 [h, w, 3]) under the columns' titles -> one picture uint8 [H, W, 3]."""
    pictures = [(caption, [_enlarged(image) for image in images]) for caption, images in rows]
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


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = "") -> np.ndarray:
    """values [len(rows), len(columns)] as a map with labels, white (low) to dark blue (high) -> uint8 [H, W, 3]."""
    values = np.asarray(values, np.float64)
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low if high > low else 1.0)
    rows, columns = ([_shortened(name, 200) for name in names] for names in (rows, columns))
    font = _font()
    cell_w, cell_h = max(14, *(int(font.getlength(name)) + 4 for name in columns)), 16
    left = max(int(font.getlength(name)) for name in rows) + 2 * MARGIN
    top = 2 * LINE + 2 * MARGIN
    heading = f"{_shortened(title, 400)}  ({low:.3g} white … {high:.3g} dark)".strip()
    width = max(left + cell_w * len(columns), int(font.getlength(heading))) + 2 * MARGIN
    canvas = Image.new("RGB", (width, top + cell_h * len(rows) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 3), heading, fill="black", font=font)
    for j, name in enumerate(columns):
        draw.text((left + j * cell_w + 2, LINE + MARGIN), name, fill="black", font=font)
    for i, name in enumerate(rows):
        draw.text((MARGIN, top + i * cell_h + 1), name, fill="black", font=font)
        for j in range(len(columns)):
            colour = tuple(int(round(255 + share[i, j] * (dark - 255))) for dark in (8, 48, 107))
            x, y = left + j * cell_w, top + i * cell_h
            draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), fill=colour, outline=(225, 225, 225))
    return np.asarray(canvas)


def save(folder: Path, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Write pictures uint8 [h, w, 3] as <folder>/<name>_<step>.png."""
    for name, image in images.items():
        write_image(folder / f"{name}_{step:06d}.png", image)
