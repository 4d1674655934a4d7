"""What callers of the public interface and of commands hand over, checked before any work."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.images.arrays import as_image
from lorweb_jax.settings.fields import Whole, shown
from lorweb_jax.settings.texts import REPLACEMENT, as_text

MAX_SIZE = Whole(16, 2**20)  # of the longest edge of a grid, pixels
RANK = Whole(1, 2**20)  # of a LoRA
Images = tuple[np.ndarray, np.ndarray, np.ndarray]


def as_path(given: Any, name: str, suffix: str = "") -> Path:
    """A str or Path that ends in `suffix`; UserError, which calls it `name`, for everything else."""
    if not isinstance(given, str | os.PathLike):
        raise UserError(f"{name} is a {type(given).__name__}, a str or Path was expected; give a path", 2)
    path = Path(given)
    if suffix and path.suffix != suffix:
        raise UserError(f"{name} is {path}; its name must end in {suffix}", 2)
    return path


def as_analogies(given: Any) -> list[Images]:
    """Triples (a, a′, b) of images, each uint8 [H, W, 3]; UserError that names the image for everything else."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not len(given):
        raise UserError(f"the analogies are a {type(given).__name__}; give a list of at least one triple (a, a2, b)")
    analogies = []
    for number, images in enumerate(given):
        of = f" of analogy {number}" if len(given) > 1 else ""
        if not isinstance(images, Sequence | np.ndarray) or isinstance(images, str) or len(images) != 3:
            raise UserError(f"analogy {number} is no triple (a, a2, b) of images; give a list of such triples")
        analogies.append(tuple(as_image(image, name + of) for image, name in zip(images, ("a", "a2", "b"))))
    return analogies


def as_prompts(given: Any, count: int | None = None) -> list[str]:
    """Texts, as many as there are analogies; UserError for everything else."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"the prompts are {shown(given)}; give a list of texts, one for each analogy")
    texts = [as_text(text, "the prompt" if len(given) == 1 else f"prompt {i}") for i, text in enumerate(given)]
    if any(text.count(REPLACEMENT) > said.count(REPLACEMENT) for text, said in zip(texts, given)):
        say("the prompt holds bytes that are not UTF-8; each is replaced by " + REPLACEMENT)
    if count is not None and len(texts) != count:
        raise UserError(f"{len(texts)} prompts were given for {count} analogies; give one for each")
    return texts
