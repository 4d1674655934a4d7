"""A b of other proportions than a's: how it comes into its quadrant of the grid, and the result back to b's size.

stretch   b takes a's size, as published; the result keeps that size
restore   the same, and the result is stretched back
pad       b is resized as a whole into a's size, its border repeated outwards; the result loses that part again
crop      the middle of b that has a's proportions is edited; the result is put in its place in b

With all but stretch the result has b's width and height.
"""

import dataclasses

import numpy as np

from lorweb_jax.images.resize import resize

STRETCH, RESTORE, PAD, CROP = FITS = ("stretch", "restore", "pad", "crop")


@dataclasses.dataclass(frozen=True)
class Placement:
    """What the model is shown of a b, and the way back.

    b: uint8 [H, W, 3]. shown: uint8 [h, w, 3], which the grid resizes to a's size. box: (left, top, width, height) in
    pixels, where b lies in `shown`, or with crop `shown` in b.
    """

    b: np.ndarray
    shown: np.ndarray
    box: tuple[int, int, int, int]
    fit: str

    def back(self, result: np.ndarray) -> np.ndarray:
        """The result for `shown`, uint8 of any size, as one for b: uint8 [H, W, 3]; of stretch as it is."""
        if self.fit == STRETCH:
            return result
        left, top, width, height = self.box
        if self.fit == CROP:
            whole = self.b.copy()
            whole[top : top + height, left : left + width] = resize(result, (width, height))
            return whole
        size = self.b.shape[1::-1]
        if (width, height) == self.shown.shape[1::-1]:
            return resize(result, size)
        across, down = (new / old for new, old in zip(result.shape[1::-1], self.shown.shape[1::-1]))
        part = left * across, top * down, (left + width) * across, (top + height) * down  # fractions of pixels count
        return resize(result, size, box=part)


def placement(b: np.ndarray, size: tuple[int, int], fit: str = STRETCH) -> Placement:
    """b uint8 [H, W, 3] for a quadrant of `size` = (width, height) pixels, by one of FITS."""
    height, width = b.shape[:2]
    if fit in (STRETCH, RESTORE):
        return Placement(b, b, (0, 0, width, height), fit)
    if fit == PAD:
        scale = min(size[0] / width, size[1] / height)
        columns, rows = (max(1, round(side * scale)) for side in (width, height))
        left, top = (size[0] - columns) // 2, (size[1] - rows) // 2
        outside = (top, size[1] - rows - top), (left, size[0] - columns - left), (0, 0)
        return Placement(b, np.pad(resize(b, (columns, rows)), outside, "edge"), (left, top, columns, rows), fit)
    scale = min(width / size[0], height / size[1])
    columns, rows = (max(1, round(side * scale)) for side in size)
    left, top = (width - columns) // 2, (height - rows) // 2
    return Placement(b, b[top : top + rows, left : left + columns], (left, top, columns, rows), fit)
