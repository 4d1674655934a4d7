"""Any PIL image as uint8 [H,W,3] sRGB: every depth, palettes, transparency, embedded profiles, orientation.

Samples of 16 bits are divided by 257 and rounded. Colours of an embedded ICC profile become sRGB (perceptual intent);
without one they are taken as sRGB, CMYK by Pillow's plain formula. What is transparent is laid on white.
"""

import functools
import io
import sys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps

from lorweb_jax.common.errors import UserError

# The same samples' other bytes, where Pillow keeps one byte of two; N is this machine's order.
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_OTHER_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA", "CMYK") for order, other in _SWAPPED.items()
}
_SPACES = {"RGB ": ("RGB",), "GRAY": ("L", "I;16"), "CMYK": ("CMYK",), "Lab ": ("LAB",)}
_KEY_SCALES = {"L;2": 85, "L;4": 17}  # Pillow widens these samples, and not the transparent one
_DEPTH = 258  # TIFF's BitsPerSample
_PHOTOMETRIC = 262  # TIFF's PhotometricInterpretation, 0: white is zero


def to_rgb(image: Image.Image, notes: list[str], again: Callable[[], ImageFile.ImageFile] | None = None) -> np.ndarray:
    """uint8 [H,W,3] of an image, whose first frame counts. What has to be told of it is added to `notes`.

    again() opens the same file a second time, for the bytes that Pillow leaves out of 16-bit colours. Raises UserError
    for samples of unknown range, and whatever Pillow raises for a damaged file.
    """
    raw, low = _raw_mode(image), None
    grey_alpha = again is not None and raw == "LA;16B" and image.mode == "RGBA"
    if grey_alpha:  # Pillow makes 8-bit RGBA of it; its four bytes a pixel are wanted as they are
        _set_raw_mode(image, "RGBA")
    elif again and raw in _OTHER_BYTES and image.mode == raw.split(";")[0]:
        with again() as second:
            _set_raw_mode(second, _OTHER_BYTES[raw])
            low = np.asarray(_upright(second, []))
    upright, deep, grey = _upright(image, notes), None, None
    if grey_alpha:
        pairs = np.asarray(upright).astype(np.uint16)
        deep = pairs[..., ::2] * 256 + pairs[..., 1::2]
        grey = deep[..., 0]
    elif low is not None:
        deep = np.asarray(upright).astype(np.uint16) * 256 + low
    alpha = _alpha(upright, deep, raw)
    if grey is not None:
        colours = Image.fromarray(grey)
    elif upright.mode.startswith("I"):
        colours = _sixteen_bit_grey(np.asarray(upright), image)
    else:
        colours = _colours(
            upright if deep is None else Image.frombytes(upright.mode, upright.size, _eight(deep).tobytes())
        )
    rgb = _in_srgb(colours, image.info, notes)
    if alpha is not None:
        rgb = Image.merge("RGBA", (*rgb.split(), Image.fromarray(alpha)))
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return np.array(rgb)


def _raw_mode(image: Image.Image) -> str:
    """How the samples lie in the file, in Pillow's words; "" where it isn't known (any more)."""
    args = image.tile[0].args if getattr(image, "tile", None) else ""
    raw = args[0] if isinstance(args, tuple) and args else args
    return raw if isinstance(raw, str) else ""


def _set_raw_mode(image: Image.Image, raw: str) -> None:
    """Have an image of a file that is not read yet be read as samples of another kind."""
    assert isinstance(image, ImageFile.ImageFile)
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image decoded, and turned as its EXIF data asks."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # on damaged EXIF data Pillow's readers raise nearly every kind of error
        notes.append("its EXIF data is damaged and left out; the image is taken as upright")
        return image


_LEVELS = ((np.arange(65536) + 128) // 257).astype(np.uint8)  # 16 bits in 8


def _eight(samples: np.ndarray) -> np.ndarray:
    return _LEVELS[samples]


def _alpha(image: Image.Image, deep: np.ndarray | None, raw: str) -> np.ndarray | None:
    """uint8 [H,W], 0 where transparent; None where nothing is."""
    if not image.has_transparency_data:
        return None
    key = image.info.get("transparency")
    if image.mode == "RGBA" and deep is not None:
        return _eight(deep[..., -1])
    if image.mode == "I;16":
        return np.where(np.asarray(image) == key, 0, 255).astype(np.uint8)
    if image.mode == "RGB" and isinstance(key, tuple):
        samples = np.asarray(image) if deep is None else deep
        return np.where((samples == np.asarray(key)).all(-1), 0, 255).astype(np.uint8)
    if image.mode == "L" and raw in _KEY_SCALES and key is not None:
        return np.where(np.asarray(image) == key * _KEY_SCALES[raw], 0, 255).astype(np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def _colours(image: Image.Image) -> Image.Image:
    """The image without transparency, in a mode that a profile may describe: L, RGB, CMYK or LAB."""
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode == "La":
        return image.convert("LA").convert("L")
    if image.mode == "F":
        raise UserError(
            "it holds floating-point numbers of unknown range, 8 or 16 bits were expected; save it with 8 "
            "bits a channel"
        )
    # Pillow warns of palettes with transparency unless they become RGBA first.
    return image.convert("RGBA").convert("RGB") if image.has_transparency_data else image.convert("RGB")


def _sixteen_bit_grey(samples: np.ndarray, image: Image.Image) -> Image.Image:
    """Mode I;16, 0..65535, of the samples of an image that Pillow opened."""
    if samples.min() < 0 or samples.max() > 65535 or image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise UserError(
            f"it has 32-bit or signed grey values ({samples.min()} to {samples.max()}), 8 or 16 bits were "
            "expected; save it with 8 bits a channel"
        )
    tags, samples = getattr(image, "tag_v2", {}), samples.astype(np.uint32)
    largest = (1 << tags.get(_DEPTH, (16,))[0]) - 1
    samples = (samples * 65535 + largest // 2) // largest  # Pillow leaves 12-bit samples in 0..4095
    return Image.fromarray((65535 - samples if tags.get(_PHOTOMETRIC) == 0 else samples).astype(np.uint16))


def _in_srgb(colours: Image.Image, info: dict, notes: list[str]) -> Image.Image:
    """The image in mode RGB: from its profile to sRGB, or as it is."""
    if "icc_profile" in info:
        try:
            space, transform = _transform(bytes(info["icc_profile"] or b""), colours.mode)
        except (OSError, ValueError, ImageCms.PyCMSError):
            notes.append("its colour profile is damaged and left out; the colours are taken as sRGB")
        else:
            if transform is not None:
                return transform(colours)
            if space == "RGB " and colours.mode in _SPACES["GRAY"]:
                return _in_srgb(_plain(colours), info, notes)
            notes.append(
                f"its colour profile is of {space.strip()} images, and it is none; the profile is left out, "
                "the colours are taken as sRGB"
            )
    return _plain(colours)


def _plain(colours: Image.Image) -> Image.Image:
    if colours.mode == "I;16":
        colours = Image.fromarray(_eight(np.asarray(colours)))
    if colours.mode == "LAB":
        colours = _built(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")), "LAB")(colours)
    return colours.convert("RGB")


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[str, Callable[[Image.Image], Image.Image] | None]:
    """(the profile's colour space, the way from an image of this mode to sRGB; None if it is of another space)."""
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space
    if mode not in _SPACES.get(space, ()):
        return space, None
    transform = _built(opened, mode)
    if mode in _SPACES["GRAY"]:  # a table of all its levels
        levels = np.arange(256, dtype=np.uint8) if mode == "L" else np.arange(65536, dtype=np.uint16)
        table = np.asarray(transform(Image.fromarray(levels[None])))[0]
        return space, lambda image: Image.fromarray(table[np.asarray(image)])
    if mode == "RGB":  # sRGB by whatever name: pictures keep their bytes, and no time is lost
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 18, 3)
        if np.abs(np.asarray(transform(Image.fromarray(grid))).astype(int) - grid).max() <= 1:
            return space, _plain
    return space, transform


def _built(profile: ImageCms.ImageCmsProfile, mode: str) -> Callable[[Image.Image], Image.Image]:
    # Of curves over grey littlecms keeps a table that is off by up to 10 levels in the dark, unless told not to.
    flags = ImageCms.Flags.NOOPTIMIZE if mode in _SPACES["GRAY"] else ImageCms.Flags.NONE
    transform = ImageCms.buildTransform(
        profile, ImageCms.createProfile("sRGB"), mode, "RGB", ImageCms.Intent.PERCEPTUAL, flags
    )
    return transform.apply
