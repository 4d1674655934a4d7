"""The analogy grid [a, a'; b, b'] and its parts (method.md section 2). All images are uint8 [H,W,3]."""

from collections.abc import Sequence

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.resize import resize


def condition_grid(a: np.ndarray, a2: np.ndarray, b: np.ndarray, max_size: int | None = None) -> np.ndarray:
    """[a, a2; b, b], what the model is shown: uint8 [2·H,2·W,3] for a [H,W,3]; a2 and b take a's size.

    With `max_size`, a grid whose longer edge exceeds it is resized to that edge (pixels of the grid, not a quadrant).
    Raises UserError for a `max_size` below 2.
    """
    return target_grid(a, a2, b, b, max_size)


def stretched(analogies: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> list[str]:
    """Sentences about a′ and b, where such an image is distorted when it is resized to a's size."""
    sentences = []
    for position, name in ((1, "a2"), (2, "b")):
        sizes = [
            (images[position].shape[1::-1], images[0].shape[1::-1])
            for images in analogies
            if other_shape(images[position].shape[1::-1], images[0].shape[1::-1])
        ]
        if sizes:
            (width, height), (a_width, a_height) = sizes[0]
            among = (
                f" in {len(sizes)} of {len(analogies)} analogies, in the first of them" if len(analogies) > 1 else ""
            )
            sentences.append(
                f"{name} is stretched to a's shape{among} from {width}x{height} to {a_width}x{a_height} "
                f"pixels; crop it to the same proportions if that is not wanted"
            )
    return sentences


def other_shape(size: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether an image of `size` = (width, height) is distorted when it is resized to `target`: by more than 1 % and
    more than the pixel that comes from rounding."""
    (width, height), (to_width, to_height) = size, target
    even_width, even_height = to_height * width / height, to_width * height / width
    return abs(even_width - to_width) > max(1, 0.01 * to_width) and abs(even_height - to_height) > max(
        1, 0.01 * to_height
    )


def target_grid(
    a: np.ndarray, a2: np.ndarray, b: np.ndarray, b2: np.ndarray, max_size: int | None = None
) -> np.ndarray:
    """[a, a2; b, b2], what the model is to make; sizes as in `condition_grid`."""
    height, width = a.shape[:2]
    a2, b, b2 = (resize(image, (width, height)) for image in (a2, b, b2))
    grid = np.concatenate([np.concatenate([a, a2], 1), np.concatenate([b, b2], 1)], 0)
    if max_size is None:
        return grid
    if max_size < 2:
        raise UserError(f"a largest size of {max_size} pixels was asked for, 2 or more was expected; try 1024")
    return within(grid, max_size)


def within(image: np.ndarray, max_size: int | None) -> np.ndarray:
    """The image, resized (bicubic) where its longer edge exceeds `max_size` pixels, sides truncated to integers."""
    longest = max(image.shape[:2])
    if max_size is None or longest <= max_size:
        return image
    height, width = (max(1, side * max_size // longest) for side in image.shape[:2])
    return resize(image, (width, height))


def quadrants(grid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """a, a', b, b' of a grid, cut at half its height and half its width, rounded down."""
    row, column = grid.shape[0] // 2, grid.shape[1] // 2
    return grid[:row, :column], grid[:row, column:], grid[row:, :column], grid[row:, column:]


def bottom_right(grid: np.ndarray) -> np.ndarray:
    """The quadrant b' of a grid: the result of an edit."""
    return quadrants(grid)[3]


def fit_to_model(image: np.ndarray, multiple: int = 16, name: str = "grid") -> tuple[np.ndarray, str | None]:
    """The grid with both sides shrunk to a multiple of `multiple`, and a sentence that says so (None: unchanged).

    The condition and the output both have this size. A multiple of 16 gives whole tokens (8x VAE, 2x2 patches) and
    puts the quadrants' edges between latents. Raises UserError if a side is shorter than `multiple`. name: what the
    image is called, if it is no grid.
    """
    height, width = image.shape[:2]
    if min(height, width) < multiple:
        least = multiple // 2 if name == "grid" else multiple
        what, which = ("grid of the images", "a first image") if name == "grid" else (name, "one")
        raise UserError(
            f"the {what} is {width}x{height} pixels, at least {multiple}x{multiple} was expected; give {which} of at "
            f"least {least}x{least} pixels, or a larger maximum size"
        )
    fitted = (width // multiple * multiple, height // multiple * multiple)
    if fitted == (width, height):
        return image, None
    return resize(image, fitted), (
        f"the {name} is resized from {width}x{height} to {fitted[0]}x{fitted[1]} pixels: the "
        f"model works on multiples of {multiple}"
    )
