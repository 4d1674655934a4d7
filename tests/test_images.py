"""Reading and writing images: every kind of file becomes RGB, every bad one a sentence."""

import io

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.io import read_image, write_image


@pytest.fixture
def picture():
    """uint8 [6,9,3] noise."""
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def test_rgb_round_trip_in_new_folder(tmp_path, picture):
    path = tmp_path / "new" / "folder" / "a.PNG"
    write_image(path, picture)
    np.testing.assert_array_equal(read_image(path), picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.PNG"]  # no temporary file stays


@pytest.mark.parametrize("suffix", [".bmp", ".tif"])
def test_lossless_formats(tmp_path, picture, suffix):
    write_image(tmp_path / f"a{suffix}", picture)
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), picture)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats(tmp_path, suffix):
    flat = np.full((16, 24, 3), (200, 60, 30), np.uint8)
    write_image(tmp_path / f"a{suffix}", flat)
    assert abs(read_image(tmp_path / f"a{suffix}").astype(int) - flat).max() <= 4  # of 255


def test_one_pixel(tmp_path):
    write_image(tmp_path / "a.png", np.array([[[1, 2, 3]]], np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[1, 2, 3]]])


def test_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[10, 20, 30], [200, 100, 50]]])
    image.save(tmp_path / "b.png", transparency=0)  # the first colour is transparent
    np.testing.assert_array_equal(read_image(tmp_path / "b.png"), [[[255, 255, 255], [200, 100, 50]]])


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array([[[200, 0, 100, 255], [200, 0, 100, 0], [200, 0, 100, 51]]], np.uint8)  # 51/255 = 0.2
    Image.fromarray(rgba).save(tmp_path / "a.png")
    expected = [[[200, 0, 100], [255, 255, 255], [244, 204, 224]]]
    assert abs(read_image(tmp_path / "a.png").astype(int) - expected).max() <= 1
    Image.fromarray(np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8), "LA").save(tmp_path / "b.png")
    assert abs(read_image(tmp_path / "b.png").astype(int) - [[[100], [255], [224]]]).max() <= 1
    Image.new("RGB", (1, 1), (7, 8, 9)).save(tmp_path / "c.png", transparency=(7, 8, 9))  # one colour key
    np.testing.assert_array_equal(read_image(tmp_path / "c.png"), [[[255, 255, 255]]])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    values = np.array([[0, 257, 32768, 65535, 40000]], np.uint16)
    if suffix == ".pgm":
        (tmp_path / "a.pgm").write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(tmp_path / f"a{suffix}")
    result = read_image(tmp_path / f"a{suffix}")
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[..., 0], np.round(values / 257))
    assert (result == result[..., :1]).all()


def test_one_bit(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), [[[255] * 3, [0] * 3]])


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # magenta and yellow ink: red
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.full((16, 16, 3), (255, 0, 0)))
    image.save(tmp_path / "a.jpg")
    assert abs(read_image(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, picture, orientation):
    """The eight orientations of the EXIF standard, table of tag 0x0112, undone by numpy."""
    stored = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_anywhere(tmp_path, kind):
    noise = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, kind)
    path = tmp_path / "a.img"
    for share in (0.0, 0.02, 0.1, 0.5, 0.8):
        path.write_bytes(data.getvalue()[: int(len(data.getvalue()) * share)])
        with pytest.raises(UserError, match="a.img"):
            read_image(path)


def test_not_images(tmp_path):
    (tmp_path / "a.png").write_text("hello")
    for path, words in (("none.png", "there is no image"), (".", "is a folder"), ("a.png", "not an image")):
        with pytest.raises(UserError, match=words):
            read_image(tmp_path / path)


def test_floating_point_and_32_bit_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_image(tmp_path / "a.tif")
    Image.fromarray(np.full((2, 2), 1 << 20, np.int32)).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match="32-bit"):
        read_image(tmp_path / "b.tif")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_100, 60_000])  # above our limit, above Pillow's
def test_decompression_bomb(tmp_path, side):
    """A tiny file that claims to be huge: the size stands in the header, the pixels are never decoded."""
    header = b"BM" + (54).to_bytes(4, "little") + bytes(4) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    size = side.to_bytes(4, "little") * 2 + (1).to_bytes(2, "little") + (24).to_bytes(2, "little") + bytes(24)
    (tmp_path / "a.bmp").write_bytes(header + size)
    with pytest.raises(UserError, match="pixels"):
        read_image(tmp_path / "a.bmp")


def test_write_errors(tmp_path, picture):
    for name in ("a.xyz", "a"):
        with pytest.raises(UserError, match="suffix"):
            write_image(tmp_path / name, picture)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        write_image(tmp_path / "file" / "a.png", picture)
    (tmp_path / "b.png").mkdir()
    with pytest.raises(UserError, match="could not be written"):
        write_image(tmp_path / "b.png", picture)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.png", "file"]
