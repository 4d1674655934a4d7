"""Arguments of the public interface and of commands, checked before any work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (numpy's name for bfloat16)
import numpy as np

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.images.arrays import as_image
from lorweb_jax.settings.rules import Choice, Whole, as_value, shown
from lorweb_jax.settings.texts import REPLACEMENT, as_text

MAX_SIZE = Whole(16, 2**20)  # of the longest edge of a grid, pixels
RANK = Whole(1, 2**20)  # of a LoRA
SIDE = Whole(16, 2**14)  # of an image to make, pixels
_DTYPES = Choice(("float32", "bfloat16", "float16"))
Images = tuple[np.ndarray, np.ndarray, np.ndarray]
Pair = tuple[np.ndarray, np.ndarray]


def as_path(value: Any, name: str, suffix: str = "") -> Path:
    """A path, whose name must end in `suffix`. UserError, which calls it `name`, for anything but a str or Path."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{name} is a {type(value).__name__}, a str or Path was expected; give a path", 2)
    if not os.fspath(value).strip():
        raise UserError(f"{name} is {value!r}, and no path; give the name of a file or folder", 2)
    path = Path(value)
    if suffix and path.suffix != suffix:
        raise UserError(f"{name} is {path}; its name must end in {suffix}", 2)
    return path


def as_dtype(value: Any) -> np.dtype:
    """A floating-point dtype that weights are kept or stored in; UserError for everything else."""
    try:
        name = np.dtype(value).name if value is not None else None
    except TypeError:
        name = value
    return np.dtype(as_value(name, "the dtype", _DTYPES))


def as_analogies(value: Any) -> list[Images]:
    """Triples (a, a′, b) of images, each uint8 [H, W, 3]; UserError that names the image for everything else."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise UserError(f"the analogies are a {type(value).__name__}; give a list of at least one triple (a, a2, b)")
    analogies = []
    for number, images in enumerate(value):
        of = f" of analogy {number}" if len(value) > 1 else ""
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str) or len(images) != 3:
            raise UserError(f"analogy {number} is no triple (a, a2, b) of images; give a list of such triples")
        analogies.append(tuple(as_image(image, name + of) for image, name in zip(images, ("a", "a2", "b"))))
    return analogies


def as_pairs(value: Any) -> list[Pair]:
    """Example pairs (a, a′) of images, each uint8 [H, W, 3], none to many; UserError for everything else."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"the further pairs are a {type(value).__name__}; give a list of pairs (a, a2) of images")
    pairs = []
    for number, images in enumerate(value):
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str) or len(images) != 2:
            raise UserError(f"further pair {number} is no pair (a, a2) of images; give a list of such pairs")
        a, a2 = (as_image(image, f"{name} of further pair {number}") for image, name in zip(images, ("a", "a2")))
        pairs.append((a, a2))
    return pairs


def as_prompts(value: Any, count: int | None = None) -> list[str]:
    """Texts, as many as there are analogies if `count` is given; UserError for everything else."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"the prompts are {shown(value)}; give a list of texts, one for each analogy")
    texts = [as_text(text, "the prompt" if len(value) == 1 else f"prompt {i}") for i, text in enumerate(value)]
    if any(text.count(REPLACEMENT) > said.count(REPLACEMENT) for text, said in zip(texts, value)):
        say("the prompt holds bytes that are not UTF-8; each is replaced by " + REPLACEMENT)
    if count is not None and len(texts) != count:
        raise UserError(f"{len(texts)} prompts were given for {count} analogies; give one for each")
    return texts


def as_size(value: Any) -> tuple[int, int]:
    """(width, height) of an image to make, in pixels -> (height, width).

    Sides are rounded down to multiples of 16, which it says. UserError for anything but two whole numbers in SIDE.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise UserError(f"the size is {shown(value)}; give (width, height) in pixels", 2)
    sides = [as_value(side, name, SIDE) for side, name in zip(value, ("the width", "the height"))]
    width, height = (side // 16 * 16 for side in sides)
    if [width, height] != sides:
        say(f"the result has {width}x{height} pixels, not {sides[0]}x{sides[1]}: the model works on multiples of 16")
    return height, width


def as_references(value: Any, count: int) -> list[list[np.ndarray]]:
    """Of each of `count` prompts its reference images, uint8 [H, W, 3], as many of each.

    value: for each prompt an image or a sequence of images; None for none. UserError, which names the image, for
    anything else.
    """
    if value is None:
        return [[] for _ in range(count)]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count:
        kind = shown(type(value)) if isinstance(value, str) or not isinstance(value, Sequence) else len(value)
        raise UserError(f"the images are {kind} and there are {count} prompts; give a list with an image for each")
    rows = []
    for number, images in enumerate(value):
        of = f" of prompt {number}" if count > 1 else ""
        several = isinstance(images, list | tuple)
        images = list(images) if several else [images]
        rows.append([as_image(image, f"the image{f' {i}' * several}{of}") for i, image in enumerate(images)])
    if len({len(row) for row in rows}) > 1:
        raise UserError(
            f"the prompts have {', '.join(str(len(row)) for row in rows)} reference images; give each as many, or make "
            "the results one by one"
        )
    return rows
