"""The analogy grid against the golden data (bit for bit), and its fit to the model."""

from pathlib import Path

import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.grid import bottom_right, condition_grid, fit_to_model, quadrants, target_grid


@pytest.mark.parametrize("images", ["landscape", "square"])
@pytest.mark.parametrize("max_size", [None, 64, 97, 500])
def test_golden_grid(images, max_size):
    golden = np.load(Path(golden_dir()) / "grid.npz")
    grid = condition_grid(*(golden[f"{images}/{name}"] for name in ("a", "atag", "b")), max_size)
    np.testing.assert_array_equal(grid, golden[f"{images}/grid_max{max_size}"])


def test_golden_edit():
    golden = np.load(Path(golden_dir()) / "e2e_square.npz")
    grid = condition_grid(golden["image_a"], golden["image_atag"], golden["image_b"])
    np.testing.assert_array_equal(grid, golden["grid"])
    np.testing.assert_array_equal(bottom_right(golden["image_out"]), golden["image_out_cropped"])


def _flat(height, width, value):
    return np.full((height, width, 3), value, np.uint8)


def test_quadrants_of_target():
    grid = target_grid(_flat(4, 6, 1), _flat(9, 2, 2), _flat(1, 1, 3), _flat(5, 5, 4))
    assert grid.shape == (8, 12, 3)
    assert [set(part.ravel().tolist()) for part in quadrants(grid)] == [{1}, {2}, {3}, {4}]
    assert all(part.shape == (4, 6, 3) for part in quadrants(grid))


def test_very_long_images_keep_a_pixel():
    assert condition_grid(*[_flat(1, 500, 9)] * 3, max_size=100).shape == (1, 100, 3)
    with pytest.raises(UserError, match="largest size"):
        condition_grid(*[_flat(4, 4, 0)] * 3, max_size=0)


def test_fit_to_model():
    grid = _flat(64, 96, 5)
    same, sentence = fit_to_model(grid)
    assert same is grid and sentence is None
    smaller, sentence = fit_to_model(_flat(46, 64, 5))
    assert smaller.shape == (32, 64, 3) and "64x46" in sentence and "64x32" in sentence
    with pytest.raises(UserError, match="2x2 pixels"):
        fit_to_model(condition_grid(*[_flat(1, 1, 0)] * 3))
