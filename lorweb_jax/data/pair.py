"""The image pair of Pair Customization, and its augmentation (method.md §7): one draw serves all images."""

import difflib
import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.data.embedded.drawings import load_drawings
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white
from lorweb_jax.images.io import read_image
from lorweb_jax.images.resize import resize

EMBEDDED = "embedded:"  # begins the name of a drawing, or of an operation on it, in the place of a path
ASPECTS = 1.02  # what the longer of two aspects may be of the other, for the images to be taken as alike

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


def read_images(names: Sequence[str], cache: str, side: int) -> list[np.ndarray]:
    """The content image, the stylised image and any others, uint8 [H, W, 3] of the first one's size.

    names: paths. "embedded:NAME" as the first is a drawing that pip has installed, of `side` x `side` pixels, rendered
    into the folder `cache`, and "embedded:OPERATION" as a later one that drawing after an operation. An image of
    another size is resized, which is said. Raises UserError for an image that can't be read, for one of another aspect,
    and for a drawing or operation that there isn't.
    """
    drawing = _drawing(names[0], cache, side)
    images: list[np.ndarray] = []
    for name in names:
        if not name.startswith(EMBEDDED):
            image = read_image(name)
        elif drawing is None:
            raise UserError(
                f"{name} stands for an operation on an embedded drawing, but the content image is the file {names[0]}; "
                "give files for both"
            )
        elif name == names[0]:
            image = on_white(drawing)
        else:
            image = OPERATIONS[_known(name, OPERATIONS, "operation")].apply(drawing)
        images.append(image if not images else _alike(image, name, images[0], names[0]))
    return images


def _drawing(name: str, cache: str, side: int) -> np.ndarray | None:
    """An embedded drawing RGBA [side, side, 4]; None for a path."""
    if not name.startswith(EMBEDDED):
        return None
    drawings = load_drawings(cache, side)
    return drawings.images[drawings.names.index(_known(name, drawings.names, "drawing"))]


def _known(name: str, known: Collection[str], kind: str) -> str:
    word = name.removeprefix(EMBEDDED)
    if word not in known:
        near = difflib.get_close_matches(word, known, n=3, cutoff=0.4) or sorted(known)[:3]
        raise UserError(f"there is no embedded {kind} {word!r}; near it are: {', '.join(near)}")
    return word


def _alike(image: np.ndarray, name: str, first: np.ndarray, first_name: str) -> np.ndarray:
    """The image at the first one's size."""
    (height, width), (h, w) = first.shape[:2], image.shape[:2]
    aspects = sorted([width * h, w * height])
    if aspects[1] > ASPECTS * aspects[0]:
        raise UserError(
            f"{name} is {w}x{h} and {first_name} is {width}x{height}, which differ in aspect; all images of a pair are "
            "cropped alike: cut them to the same part of the picture"
        )
    if (h, w) != (height, width):
        say(f"{name} is resized from {w}x{h} to the {width}x{height} pixels of {first_name}")
    return resize(image, (width, height))


class Augmentation:
    """Images of one size [H, W, 3] as training sees them, at a long edge in pixels; see `draw` and `augment`."""

    def __init__(self, images: Sequence[np.ndarray], long_edge: int):
        self.images, self.long_edge = images, long_edge
        self._resized: dict[str, list[np.ndarray]] = {}  # by ratio

    def plain(self) -> np.ndarray:
        """All images as they are, resized alone: float32 [images, h, w, 3] in −1..1."""
        return np.stack(self._levels("as it is"))

    def require_drawable(self) -> None:
        """UserError where one of RATIOS would leave too short a side, before a batch draws it."""
        for ratio in RATIOS:
            try:
                resized_shape(self.images[0].shape, ratio, self.long_edge)
            except UserError as error:
                raise UserError(f"of the ratios that config.data.augment draws, {ratio} fails: {error}", 2) from None

    def drawn(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """`count` draws of all images, float32 [count, images, h, w, 3], of one ratio, which decides the size."""
        ratio = draw_ratio(rng)
        draws = [draw(rng, self.images[0].shape, self.long_edge, ratio) for _ in range(count)]
        return np.stack([[cropped(levels, each) for levels in self._levels(ratio)] for each in draws])

    def _levels(self, ratio: str) -> list[np.ndarray]:
        if ratio not in self._resized:
            self._resized[ratio] = [resized(image, ratio, self.long_edge) for image in self.images]
        return self._resized[ratio]


def draw_ratio(rng: np.random.Generator) -> str:
    """A key of RATIOS, uniformly."""
    return list(RATIOS)[rng.integers(len(RATIOS))]


def draw(rng: np.random.Generator, shape: tuple[int, ...], long_edge: int, ratio: str | None = None) -> Draw:
    """A draw for an image of this shape [H, W, 3], of the given ratio or of `draw_ratio`'s.

    The crop's area is uniform in AREA of the resized image's, its aspect is the drawn ratio (of "as it is": the image's
    own); where ten tries give none that fits, it is the largest centred crop of that aspect.
    """
    ratio = ratio or draw_ratio(rng)
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
    return cropped(resized(image, drawn.ratio, long_edge), drawn)


def cropped(levels: np.ndarray, drawn: Draw) -> np.ndarray:
    """What `resized` gives, cut and flipped as the draw says, at the same size."""
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
