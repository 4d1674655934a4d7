"""A b of other proportions than a's: where it lies in its quadrant, by formulas, and what comes back in its size."""

import numpy as np
import pytest

from lorweb_jax.images.fit import placement


def ramp(width, height):
    """Red rises by 2 a column, green by 2 a row."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([2 * x, 2 * y, 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("width, height", [(60, 30), (20, 90), (48, 64), (7, 200)])
def test_the_padding_comes_off(width, height):
    """b lies in the middle at one scale; a result that is a ramp comes back as the part of the ramp where b lay."""
    size = 64, 48
    place = placement(np.full((height, width, 3), 100, np.uint8), size, "pad")
    assert place.shown.shape == (48, 64, 3) and (place.shown == 100).all()  # its border goes on outwards
    scale = min(size[0] / width, size[1] / height)
    back = place.back(ramp(2 * size[0], 2 * size[1])).astype(float)  # the result may have another size
    assert back.shape == (height, width, 3)
    for axis, (side, full) in enumerate(zip((width, height), size)):
        # Centres of b's pixels in the quadrant, then in the result of twice its size; b's sides are rounded to pixels.
        centres = full / 2 + (np.arange(side) + 0.5 - side / 2) * scale
        expected = 2 * (2 * centres - 0.5)
        mean = back[..., axis].mean(axis)
        inner = slice(side // 8, side - side // 8)
        np.testing.assert_allclose(mean[inner], expected[inner], atol=3)  # half a pixel of the quadrant, and rounding


def test_a_stretch_is_undone():
    """A ramp as the result, of b's size again; by itself stretching leaves a's."""
    result, b = ramp(64, 48), np.zeros((24, 96, 3), np.uint8)
    back = placement(b, (64, 48), "restore").back(result)
    assert back.shape == b.shape and placement(b, (64, 48)).back(result) is result
    expected = 2 * ((np.arange(96) + 0.5) * 64 / 96 - 0.5)
    np.testing.assert_allclose(back[..., 0].mean(0)[4:-4], expected[4:-4], atol=1)


@pytest.mark.parametrize("width, height, box", [(60, 30, (10, 0, 40, 30)), (20, 90, (0, 37, 20, 15)), (64, 48, None)])
def test_what_is_cropped_stays(width, height, box):
    """The middle of a's proportions is shown, pixel by pixel, and its result lies there; the rest is b."""
    b = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    place, (left, top, columns, rows) = placement(b, (64, 48), "crop"), box or (0, 0, width, height)
    middle = np.s_[top : top + rows, left : left + columns]
    np.testing.assert_array_equal(place.shown, b[middle])
    np.testing.assert_array_equal(place.back(place.shown), b)
    whole = place.back(np.zeros((12, 16, 3), np.uint8))
    assert not whole[middle].any()
    whole[middle] = b[middle]
    np.testing.assert_array_equal(whole, b)
