"""Every kind of image becomes the sRGB picture that it means: depth, palette, transparency, profile, in every format.

The files are written by hand (image_files.py), what they mean is computed in float64 from the specifications.
"""

import io
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from image_files import PROPHOTO, SRGB, cmyk_profile, encode, grey_profile, lab_to_srgb, png, rgb_profile, tiff
from PIL import Image

import lorweb_jax
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.relation252k import SideBySide
from lorweb_jax.images.arrays import as_image
from lorweb_jax.images.io import read_image

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [
    (0, 1),
    (0, 2),
    (0, 4),
    (0, 8),
    (0, 16),
    (2, 8),
    (2, 16),
    (3, 1),
    (3, 2),
    (3, 4),
    (3, 8),
    (4, 8),
    (4, 16),
    (6, 8),
    (6, 16),
]
TOLD = "its colour profile"


def meant(colour, alpha):
    """What is seen on white: colour [H, W, 1 or 3] and alpha [H, W, 1], 0..1 -> levels [H, W, 3], not rounded."""
    return 255 * (np.repeat(colour, 3 // colour.shape[-1], -1) * alpha + 1 - alpha)


@pytest.mark.parametrize("linear", [False, True], ids=["", "profile"])
@pytest.mark.parametrize(
    "colour, depth, transparent",
    [(*kind, transparent) for kind in KINDS for transparent in (False, True)[: 1 if kind[0] in (4, 6) else 2]],
)
def test_png(tmp_path, colour, depth, transparent, linear):
    """All 15 combinations of colour type and depth, opaque or with a transparent colour (which PNG doesn't have beside
    alpha), in sRGB or linear light."""
    random = np.random.default_rng(colour * 100 + depth)
    largest = (1 << depth) - 1
    samples = random.integers(0, largest + 1, (9, 13, CHANNELS[colour]))
    samples[0, 0], samples[-1, -1] = 0, largest
    values, alpha, options = samples / largest, np.ones((9, 13, 1)), {}
    if colour == 3:
        palette = random.integers(0, 256, (largest + 1, 3), dtype=np.uint8)
        values, options["palette"] = palette[samples[..., 0]] / 255, palette.tobytes()
        if transparent:
            alphas = np.full(largest + 1, 255)
            alphas[:2] = 0, 102
            options["trns"], alpha = bytes([0, 102]), alphas[samples] / 255
    elif transparent:
        key = samples[4, 4]
        options["trns"] = struct.pack(f">{len(key)}H", *key)
        if depth == 16:  # differs in the low byte alone: not transparent
            samples[4, 5] = key ^ 1
            values = samples / largest
        alpha = 1.0 - (samples == key).all(-1, keepdims=True)
    elif colour in (4, 6):
        values, alpha = values[..., :-1], values[..., -1:]
    if linear:
        options["icc"] = grey_profile(1.0) if colour in (0, 4) else rgb_profile(SRGB, 1.0)
        values = encode(values)
    (tmp_path / "a.png").write_bytes(png(colour, depth, samples, **options))
    result = read_image(tmp_path / "a.png")
    assert result.dtype == np.uint8 and result.shape == (9, 13, 3)
    # 16 bits of colours in linear light pass by 8: a level of which is 13 dark ones of sRGB's.
    steps = 7 if linear and depth == 16 and colour in (2, 4, 6) else 1.01
    difference = np.abs(result - meant(values, alpha))
    assert difference.max() <= steps and np.median(difference) <= 1
    if not linear and not transparent and colour in (0, 2, 3):
        np.testing.assert_array_equal(result, meant(values, alpha).round())


@pytest.mark.parametrize(
    "channels, depth, photometric, order",
    [
        (1, 8, 1, "<"),
        (1, 8, 0, "<"),
        (1, 16, 1, "<"),
        (1, 16, 1, ">"),
        (1, 16, 0, "<"),
        (1, 12, 1, "<"),
        (3, 8, 2, "<"),
        (3, 16, 2, "<"),
        (3, 16, 2, ">"),
        (4, 8, 5, "<"),
        (4, 16, 5, "<"),
    ],
)
@pytest.mark.parametrize("deflated", [False, True], ids=["", "deflated"])
def test_tiff(tmp_path, channels, depth, photometric, order, deflated):
    """Grey both ways round, RGB and CMYK, 12 and 16 bits, both byte orders; decoded by Pillow or by libtiff."""
    samples = np.random.default_rng(depth).integers(0, 1 << depth, (6, 10, channels))
    (tmp_path / "a.tif").write_bytes(tiff(samples, depth, photometric, order, deflated))
    values = samples / ((1 << depth) - 1)
    if photometric == 5:
        values = (1 - values[..., :3]) * (1 - values[..., 3:])
    expected = meant(1 - values if photometric == 0 else values, 1.0).round()
    assert np.abs(read_image(tmp_path / "a.tif") - expected).max() <= (depth == 12 or photometric == 5)


def test_embedded_profile_in_every_format(tmp_path, capsys):
    """ProPhoto colours of gamma 1.8, inside sRGB's gamut, in each format that holds a profile."""
    levels = np.random.default_rng(1).uniform(0.25, 0.75, (3, 4, 3))
    proven = np.clip(np.linalg.inv(PROPHOTO) @ SRGB @ levels[..., None], 0, 1)[..., 0]
    stored = (255 * proven ** (1 / 1.8)).round()
    expected = 255 * encode((np.linalg.inv(SRGB) @ PROPHOTO @ ((stored / 255) ** 1.8)[..., None])[..., 0])
    pixels = stored.astype(np.uint8).repeat(16, 0).repeat(16, 1)
    icc = rgb_profile(PROPHOTO, 1.8)
    for suffix, options in (
        ("png", {}),
        ("jpg", {"quality": 100, "subsampling": 0}),
        ("tif", {}),
        ("webp", {"lossless": True}),
        ("avif", {"quality": 100, "subsampling": "4:4:4"}),
    ):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", icc_profile=icc, **options)
        result = read_image(tmp_path / f"a.{suffix}")[8::16, 8::16]
        assert np.abs(result - expected).max() <= (2 if suffix in ("png", "tif", "webp") else 5), suffix
    # The two halves of a training file are of the same colours.
    before, after = SideBySide(str(tmp_path / "a.png"), "", "", "").read()
    np.testing.assert_array_equal(np.concatenate([before, after], 1), read_image(tmp_path / "a.png"))
    assert capsys.readouterr().out == ""
    assert np.abs(read_image(tmp_path / "a.png")[8::16, 8::16] - stored).mean() > 10  # the test would see it ignored


def test_profile_of_srgb_itself_changes_no_byte(tmp_path):
    from PIL import ImageCms

    pixels = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(
        tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    )
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), pixels)


def test_cmyk_profile(tmp_path):
    """A printer's profile says what its inks look like; without one, Pillow's plain formula."""
    lab = np.zeros((2, 2, 2, 2, 3))
    lab[..., 0] = 40.0
    lab[1, 1, 1, 1] = 0, 0, 0
    lab[0, 0, 0, 0] = 100.0, 0, 0
    lab[1, 0, 0, 0] = 60.0, -20, -30
    for suffix in ("tif", "jpg"):
        image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
        image.paste((0, 0, 0, 0), (0, 0, 16, 8))
        image.save(tmp_path / f"a.{suffix}", icc_profile=cmyk_profile(lab))
        result = read_image(tmp_path / f"a.{suffix}").astype(float)
        assert np.abs(result[:8] - 255).max() <= 2
        assert np.abs(result[8:] - 255 * lab_to_srgb(lab[1, 0, 0, 0])).max() <= 3


@pytest.mark.parametrize(
    "icc, colour, said",
    [
        (b"", 2, "damaged"),
        (b"rubbish" * 30, 2, "damaged"),
        (rgb_profile(SRGB, 1.0)[:300], 2, "damaged"),
        (rgb_profile(SRGB, 1.0)[:128].ljust(400, b"\0"), 2, "damaged"),
        (grey_profile(1.0), 2, "of GRAY images"),
        (cmyk_profile(np.zeros((2, 2, 2, 2, 3))), 2, "of CMYK images"),
    ],
)
def test_profile_of_no_use_is_left_out_and_told(tmp_path, capsys, icc, colour, said):
    samples = np.arange(60).reshape(4, 5, 3)
    (tmp_path / "a.png").write_bytes(png(colour, 8, samples, icc=icc))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), samples)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "a.png" in told and TOLD in told and said in told
    told = []
    read_image(tmp_path / "a.png", lambda path, what: told.append((path, what)))
    assert told[0][0].endswith("a.png") and said in told[0][1] and not capsys.readouterr().out


def test_grey_with_a_profile_of_rgb(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, 8, np.array([[[0], [64], [255]]]), icc=rgb_profile(SRGB, 1.0)))
    expected = 255 * encode(np.array([0, 64 / 255, 1]))
    assert np.abs(read_image(tmp_path / "a.png")[0, :, 1] - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_first_of_several_frames(tmp_path, capsys, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(
        tmp_path / f"a.{suffix}",
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if suffix == "webp" else {}),
    )
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), np.full((4, 4, 3), (255, 0, 0)))
    assert "the first one is taken" in capsys.readouterr().out


def test_damaged_exif_is_told(tmp_path, capsys):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png", exif=b"Exif\0\0rubbish and no TIFF header")
    assert read_image(tmp_path / "a.png").shape == (2, 3, 3)
    assert "EXIF data is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    "start, said",
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"%PDF-1.4", "a PDF"),
        (b"<svg/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"8BPS\0\1", "Photoshop"),
        (b"", "empty"),
        (b"hello", "not an image"),
    ],
)
def test_other_formats_are_named_and_not_opened(tmp_path, start, said):
    (tmp_path / "a.png").write_bytes(start)
    with pytest.raises(UserError, match=said):
        read_image(tmp_path / "a.png")


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError, match="device or a pipe"):
            read_image(path)


@pytest.mark.parametrize(
    "value, said",
    [
        ("a.png", "read_image"),
        (None, "NoneType"),
        ([[0]], "list"),
        (np.zeros((2, 2), np.uint8), "np.repeat"),
        (np.zeros((2, 2, 4), np.uint8), r"\[\.\.\., :3\]"),
        (np.zeros((2, 2, 1), np.uint8), "np.repeat"),
        (np.zeros((3, 5, 6), np.uint8), "transpose"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"images\[0\]"),
        (np.zeros((2, 2, 3), bool), r"\* 255"),
        (np.zeros((2, 2, 3), np.uint16), "/ 257"),
        (np.ones((2, 2, 3), np.float32), r"image \* 255"),
        (np.full((2, 2, 3), 200.0), r"scale it with image.round"),
        (-np.ones((2, 2, 3)), r"\+ 1"),
        (np.full((2, 2, 3), np.nan), "uint8"),
        (np.zeros((2, 2, 3), np.int64), "int64"),
        (np.zeros((0, 2, 3), np.uint8), "0 pixels|2x0"),
        (np.array(["x"]), "array"),
    ],
)
def test_arrays_that_are_no_image(value, said):
    with pytest.raises(UserError, match=said):
        as_image(value, "a")


def test_arrays_that_other_libraries_hold():
    torch = pytest.importorskip("torch")
    import jax.numpy as jnp

    for value in (torch.zeros(2, 2, 3, dtype=torch.uint8), jnp.zeros((2, 2, 3), jnp.uint8)):
        with pytest.raises(UserError, match="numpy array"):
            as_image(value, "a")


def test_pil_images_are_taken():
    rgba = Image.new("RGBA", (3, 2), (200, 0, 100, 51))
    assert np.abs(as_image(rgba, "a").astype(int) - (244, 204, 224)).max() <= 1
    with pytest.raises(UserError, match="b: it holds floating"):
        as_image(Image.new("F", (2, 2)), "b")
    with pytest.raises(UserError, match="b could not be read"):
        as_image(Image.open(io.BytesIO(png(0, 8, np.zeros((99, 99, 1), int))[:60])), "b")


def test_one_reader_and_one_resize():
    """Whatever reads an image file or resizes one does it by the same function."""
    found = {
        name: {
            path.name for path in Path(lorweb_jax.__file__).parent.rglob("*.py") if re.search(pattern, path.read_text())
        }
        for name, pattern in (("open", r"\bImage\.open\("), ("resize", r"(?<!np)(?<!jax\.image)\.resize\("))
    }
    # Drawings come with packages; plots.py opens what matplotlib has just drawn in memory.
    assert found == {"open": {"io.py", "drawings.py", "drawing_sets.py", "plots.py"}, "resize": {"resize.py"}}
