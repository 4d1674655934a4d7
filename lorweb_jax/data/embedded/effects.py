"""What the image operations do to pixels: pure functions RGBA uint8 [H,W,4] -> RGB uint8 [H,W,3].

Lengths are fractions of the shorter side, so that an operation looks alike at every size. Drawings lie on white
unless the operation says otherwise. Colours are (red, green, blue) in 0..255.
"""

import numpy as np
from PIL import Image, ImageFilter

from lorweb_jax.images.resize import resize

COLOURS = {
    "red": (228, 30, 38),
    "orange": (255, 140, 0),
    "yellow": (255, 220, 20),
    "green": (20, 165, 60),
    "blue": (35, 85, 230),
    "purple": (140, 50, 200),
    "pink": (255, 130, 190),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
}
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def _bytes(image) -> np.ndarray:
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _alpha(rgba) -> np.ndarray:
    """How much of each pixel is drawn, 0..1, [H,W,1]."""
    return rgba[..., 3:].astype(np.float32) / 255


def _unit(image) -> int:
    return min(image.shape[:2])


def _over(image, colour, amount) -> np.ndarray:
    """`colour` laid over `image` [H,W,3] with opacity `amount` 0..1 ([H,W] or [H,W,1])."""
    amount = np.asarray(amount, np.float32).reshape(*image.shape[:2], 1)
    return _bytes(image * (1 - amount) + np.asarray(colour, np.float32) * amount)


def _coordinates(image) -> tuple[np.ndarray, np.ndarray]:
    """x [1,W] and y [H,1] of the pixel centres from the image's centre, in units of the shorter side."""
    height, width = image.shape[:2]
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / _unit(image)
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) / _unit(image)
    return x[None], y[:, None]


def _inside(image, distance) -> np.ndarray:
    """A shape's opacity from the signed distance to its edge (positive inside), with an edge one pixel soft."""
    return np.clip(distance * _unit(image) + 0.5, 0, 1)


def on_colour(rgba, colour) -> np.ndarray:
    alpha = _alpha(rgba)
    return _bytes(rgba[..., :3] * alpha + np.asarray(colour, np.float32) * (1 - alpha))


def on_white(rgba) -> np.ndarray:
    """The drawing on white: the picture before any operation."""
    return on_colour(rgba, COLOURS["white"])


# Colour


def tint(rgba, colour) -> np.ndarray:
    """Only shades of one colour are left: black stays black, white becomes a pale shade of it."""
    light = (rgba[..., :3] @ LUMINANCE)[..., None] / 255
    colour = np.asarray(colour, np.float32)
    shade = np.where(light < 0.5, colour * light * 2, colour + (255 - colour) * (light - 0.5) * 1.2)
    return on_colour(np.concatenate([_bytes(shade), rgba[..., 3:]], -1), COLOURS["white"])


def on_gradient(rgba, above, below) -> np.ndarray:
    """On a background that goes from one colour at the top to another at the bottom."""
    share = (np.arange(len(rgba), dtype=np.float32)[:, None, None] + 0.5) / len(rgba)
    colour = np.asarray(above, np.float32) * (1 - share) + np.asarray(below, np.float32) * share
    return on_colour(rgba, np.broadcast_to(colour, (*rgba.shape[:2], 3)))


def on_pattern(rgba, colour, phase) -> np.ndarray:
    """On white where `phase`(x, y) has an even whole part, on `colour` where it has an odd one."""
    x, y = _coordinates(rgba)
    odd = np.broadcast_to(np.floor(phase(x, y)) % 2, rgba.shape[:2])[..., None]
    return on_colour(rgba, 255 + (np.asarray(colour, np.float32) - 255) * odd)


def invert(rgba) -> np.ndarray:
    return 255 - on_white(rgba)


def grayscale(rgba) -> np.ndarray:
    return _bytes(np.repeat((on_white(rgba) @ LUMINANCE)[..., None], 3, -1))


def sepia(rgba) -> np.ndarray:
    return _bytes(30 + (on_white(rgba) @ LUMINANCE)[..., None] * np.array([0.85, 0.65, 0.38], np.float32))


def lit(rgba, light) -> np.ndarray:
    """The whole picture under coloured light, `light` = factors of red, green and blue."""
    return _bytes(on_white(rgba) * np.asarray(light, np.float32))


def faded(rgba) -> np.ndarray:
    return _over(on_white(rgba), COLOURS["white"], np.full(rgba.shape[:2], 0.65))


def swapped(rgba, first, second) -> np.ndarray:
    """Two of the channels red, green and blue (0, 1, 2) change places within the drawing."""
    order = [0, 1, 2, 3]
    order[first], order[second] = second, first
    return on_white(rgba[..., order])


# Style


def silhouette(rgba, colour) -> np.ndarray:
    return _over(np.full_like(rgba[..., :3], 255), colour, _alpha(rgba))


def outline(rgba, colour) -> np.ndarray:
    """A thick coloured line around the drawing: its blurred mask, hardened, beneath it."""
    mask = Image.fromarray(np.pad(rgba[..., 3], _unit(rgba)))
    spread = np.asarray(mask.filter(ImageFilter.GaussianBlur(0.06 * _unit(rgba))), np.float32) / 255
    unit = _unit(rgba)
    around = np.clip((spread[unit:-unit, unit:-unit] - 0.04) * 8, 0, 1)
    beneath = _over(np.full_like(rgba[..., :3], 255), colour, around)
    return _over(beneath, rgba[..., :3], _alpha(rgba))


def lines(rgba, paper, ink) -> np.ndarray:
    """Only the dark lines of the drawing, in `ink` on `paper`."""
    darkness = 1 - on_white(rgba).max(-1) / 255
    return _over(
        np.broadcast_to(np.asarray(paper, np.uint8), (*rgba.shape[:2], 3)), ink, np.clip((darkness - 0.15) * 2.5, 0, 1)
    )


def pixelate(rgba) -> np.ndarray:
    height, width = rgba.shape[:2]
    cell = _unit(rgba) / 8
    small = resize(on_white(rgba), (max(1, round(width / cell)), max(1, round(height / cell))), Image.Resampling.BOX)
    return resize(small, (width, height), Image.Resampling.NEAREST)


def blur(rgba) -> np.ndarray:
    return np.asarray(Image.fromarray(on_white(rgba)).filter(ImageFilter.GaussianBlur(0.06 * _unit(rgba))))


# Geometry


def fitted(rgba, *boxes) -> np.ndarray:
    """Copies of the drawing on white, each resized into a box (left, top, right, bottom) in 0..1 of the picture."""
    height, width = rgba.shape[:2]
    canvas = np.full((height, width, 3), 255, np.uint8)
    for left, top, right, bottom in boxes:
        x, y = round(left * width), round(top * height)
        size = max(1, round(right * width) - x), max(1, round(bottom * height) - y)
        layer = Image.new("RGBA", (width, height))
        layer.paste(Image.fromarray(resize(rgba, size)), (x, y))
        layer = np.asarray(layer)
        canvas = _over(canvas, layer[..., :3], _alpha(layer))
    return canvas


def flip(rgba, axis) -> np.ndarray:
    return on_white(np.flip(rgba, axis))


def rotate(rgba, degrees) -> np.ndarray:
    """Turned anticlockwise about the centre; the picture keeps its size."""
    return on_white(np.asarray(Image.fromarray(rgba).rotate(degrees, Image.Resampling.BICUBIC)))


def mirror(rgba, axis) -> np.ndarray:
    """The first half along `axis`, and its mirror image in place of the second half."""
    image = on_white(rgba)
    half = np.arange(image.shape[axis])
    return np.take(image, np.minimum(half, half[::-1]), axis)


# Additions


def frame(rgba, colour) -> np.ndarray:
    x, y = _coordinates(rgba)
    height, width = rgba.shape[:2]
    edge = np.minimum(width / 2 / _unit(rgba) - abs(x), height / 2 / _unit(rgba) - abs(y))
    return _over(on_white(rgba), colour, _inside(rgba, 0.1 - edge))


def dot(rgba, colour, right, bottom) -> np.ndarray:
    """A filled circle in one corner; `right` and `bottom` are 0 or 1."""
    height, width = rgba.shape[:2]
    x, y = _coordinates(rgba)
    centre_x = (right - 0.5) * (width / _unit(rgba) - 0.4)
    centre_y = (bottom - 0.5) * (height / _unit(rgba) - 0.4)
    return _over(on_white(rgba), colour, _inside(rgba, 0.16 - np.hypot(x - centre_x, y - centre_y)))


def stripes(rgba, colour, along_x, along_y) -> np.ndarray:
    """Stripes, 4·along_x of them over the shorter side to the right and 4·along_y downwards."""
    x, y = _coordinates(rgba)
    phase = (x * along_x + y * along_y) * 4
    return _over(on_white(rgba), colour, _inside(rgba, (0.2 - abs(phase - np.floor(phase) - 0.5)) / 4))


def checker(rgba, colour) -> np.ndarray:
    x, y = _coordinates(rgba)
    odd = (np.floor(x * 4) + np.floor(y * 4)) % 2
    return _over(on_white(rgba), colour, odd * 0.75)


def cross(rgba, colour) -> np.ndarray:
    x, y = _coordinates(rgba)
    return _over(on_white(rgba), colour, _inside(rgba, 0.07 - np.minimum(abs(x - y), abs(x + y)) / np.sqrt(2)))


def disc(rgba, colour) -> np.ndarray:
    """Everything outside a circle is painted over."""
    x, y = _coordinates(rgba)
    return _over(on_white(rgba), colour, _inside(rgba, np.hypot(x, y) - 0.4))


def diamond(rgba, colour) -> np.ndarray:
    """Everything outside a square standing on its corner is painted over."""
    x, y = _coordinates(rgba)
    return _over(on_white(rgba), colour, _inside(rgba, (abs(x) + abs(y) - 0.5) / np.sqrt(2)))


def hide(rgba, colour, along_x, along_y) -> np.ndarray:
    """One half is painted over: the right one for along_x = 1, the left one for −1, the lower one for along_y = 1."""
    x, y = _coordinates(rgba)
    return _over(on_white(rgba), colour, np.broadcast_to(x * along_x + y * along_y > 0, rgba.shape[:2]))


def shadow(rgba, colour, along_x, along_y) -> np.ndarray:
    """A hard shadow beneath the drawing, thrown a tenth of the side towards (along_x, along_y)."""
    away = np.zeros_like(rgba[..., 3])
    dx, dy = (round(0.1 * _unit(rgba)) * along for along in (along_x, along_y))
    height, width = away.shape
    away[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = rgba[
        max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx), 3
    ]
    beneath = _over(np.full_like(rgba[..., :3], 255), colour, away / 255)
    return _over(beneath, rgba[..., :3], _alpha(rgba))
