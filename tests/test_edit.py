"""The edit command: what it writes, and what it says of bad requests."""

import subprocess
import sys

import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax import UserError, edit, read_image, write_image


@pytest.fixture
def images(tmp_path):
    recorded = np.load(golden_dir() / "e2e_square.npz")
    names = {"a": "image_a", "a2": "image_atag", "b": "image_b"}
    for name, key in names.items():
        write_image(tmp_path / f"{name}.png", recorded[key])
    write_image(tmp_path / "c.png", recorded["image_atag"])
    return tmp_path


def arguments(folder, *more, b=("b.png",), out="out.png"):
    return ["--pipeline", str(golden_dir() / "tiny_pipeline"), "--basis", str(golden_dir() / "basis_a.safetensors"),
            "--a", str(folder / "a.png"), "--a2", str(folder / "a2.png"), "--b", *(str(folder / name) for name in b),
            "--out", str(folder / out), "--steps", "1", *more]


def test_one_and_several(images):
    edit.main(arguments(images))
    edit.main(arguments(images, b=("b.png", "c.png"), out="results"))
    one, first, second = (read_image(images / name) for name in ("out.png", "results/b.png", "results/c.png"))
    assert one.shape == first.shape == second.shape == (64, 64, 3)
    # Folded for one, beside the weights for two: the same image but for rounding.
    assert np.abs(one.astype(int) - first).max() <= 1
    assert np.abs(first.astype(int) - second).max() > 1


@pytest.mark.parametrize("more, said", [
    (["--steps", "0"], "--steps is 0"),
    (["--basis", "nowhere"], "nowhere"),
    (["--pipeline", "nowhere"], "nowhere"),
])
def test_bad_requests(images, more, said):
    with pytest.raises(UserError, match=said):
        edit.main(arguments(images, *more))


def test_missing_image_and_one_file_for_two(images):
    with pytest.raises(UserError, match="missing.png"):
        edit.main(arguments(images, b=("missing.png",)))
    with pytest.raises(UserError, match="give a folder"):
        edit.main(arguments(images, b=("b.png", "c.png")))


def test_help_is_quick_and_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "lorweb_jax.edit"]
    assert "a is to a2 as b is to the result" in subprocess.run(
        [*command, "--help"], capture_output=True, text=True, check=True).stdout
    wrong = subprocess.run([*command, "--a", "x.png", "--a2", "x.png", "--b", "x.png", "--out", "y.png"],
                           capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "x.png" in wrong.stderr
