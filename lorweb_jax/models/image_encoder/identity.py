"""Which image encoder a folder holds: the name that the published program knows it by, and a sketch of its weights.

A basis asks the encoder that it was trained with; another one of the same width would give a query that means nothing.
"""

import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.models.clip import folder as clip
from lorweb_jax.models.siglip import model as siglip

CLIP, SIGLIP = "openai/clip-vit-large-patch14", "google/siglip2-base-patch16-224"
NAMES = (CLIP, SIGLIP)  # the only ones that the published program compares with
OTHERS = {CLIP: "other-clip", SIGLIP: "other-siglip"}  # of the same family
_CLIP_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "quick_gelu",
}
_SIGLIP2_WORDS, _SIGLIP_WORDS = 256_000, 32_000  # of the text tower beside it; the first SigLIP has the same sizes

_TENSORS = 8  # that are sketched
# Weights kept in 16 bit move a tensor's norm and projection by about a thousandth of the norm, other weights by all
# of it.
_TOLERANCE = 0.02
_SKETCH = re.compile(r"1(:-?\d+\.\d{4}/\d+\.\d{5}e[+-]\d\d){1,16}")


@dataclasses.dataclass(frozen=True)
class Identity:
    """name: one of NAMES or OTHERS. sketch: text that `same` compares."""

    name: str
    sketch: str


def identity(folder: str | Path) -> Identity:
    """Of the encoder in a folder that `open_image_encoder` takes. UserError if its weights can't be read."""
    folder = Path(folder)
    checkpoint = Checkpoint(folder)
    names = sorted(
        name
        for name, shape in checkpoint.shapes.items()
        if len(shape) > 1
        and not name.endswith("position_ids")
        and name.startswith(("vision_model.", "visual_projection."))
    )
    chosen = [names[k] for k in np.unique(np.linspace(0, len(names) - 1, _TENSORS).astype(int))] if names else []
    return Identity(published_name(folder), ":".join(["1", *(_sketched(checkpoint.read(name)) for name in chosen)]))


def _sketched(array: np.ndarray) -> str:
    """projection/norm: on signs that are always the same, in units of the norm."""
    values = array.astype(np.float64).reshape(-1)
    signs = np.unpackbits(np.random.Philox(key=1).random_raw(-(-values.size // 64)).view(np.uint8))[: values.size]
    norm = float(np.linalg.norm(values))
    return f"{float(values @ (2.0 * signs - 1.0)) / max(norm, 1e-30):.4f}/{norm:.5e}"


def is_sketch(text: str) -> bool:
    return _SKETCH.fullmatch(text) is not None


def same(sketch: str, other: str) -> bool:
    """Whether two sketches are of the same weights, in whatever dtype and files."""
    pairs = [[part.split("/") for part in text.split(":")[1:]] for text in (sketch, other)]
    return len(pairs[0]) == len(pairs[1]) and all(
        abs(float(a) - float(b)) <= _TOLERANCE and abs(float(x) - float(y)) <= _TOLERANCE * max(float(x), float(y))
        for (a, x), (b, y) in zip(*pairs)
    )


def published_name(folder: Path) -> str:
    """By the encoder's architecture and sizes, else by what it is called; OTHERS for an encoder that is neither."""
    data = read_json(folder / "config.json")
    if str(data.get("model_type")).startswith("clip"):
        sizes = dataclasses.asdict(clip.vision_config(folder))
        family, fits = CLIP, all(sizes[name] == value for name, value in _CLIP_SIZES.items())
    else:
        family, fits = (
            SIGLIP,
            siglip.SiglipConfig.from_folder(folder) == siglip.SiglipConfig() and _words(data) == _SIGLIP2_WORDS,
        )
    called = (known_name(str(data.get("_name_or_path", ""))), known_name(str(folder.absolute())))
    return family if fits or family in called else OTHERS[family]


def _words(data: dict[str, Any]) -> int:
    text = data.get("text_config")
    if not isinstance(text, dict):  # the vision tower alone
        return _SIGLIP_WORDS if "siglip-" in str(data.get("_name_or_path", "")) else _SIGLIP2_WORDS
    return text.get("vocab_size", _SIGLIP_WORDS)


def known_name(path: str) -> str | None:
    """The one of NAMES that a path or name is called by, also as the Hub's cache calls its folders."""
    parts = PurePosixPath(path.replace("\\", "/").replace("--", "/")).parts
    return next((name for name in NAMES if name.split("/")[1] in parts), None)


def publishable(name: str) -> str:
    """`name` if nothing of this machine is in it, else what is left of it: one of NAMES, "other", or nothing."""
    if name in (*NAMES, *OTHERS.values(), "", "other"):
        return name
    return known_name(name) or "other"


def require_same(wanted: str, folder: Path, name: str) -> None:
    """UserError unless the folder's encoder is the one that the sketch `wanted` is of."""
    if not same(wanted, (found := identity(folder)).sketch):
        called = f" ({name}, while this is {found.name})" if name not in ("", found.name) else ""
        raise UserError(
            f"the basis was trained with another image encoder than {folder} holds{called}: its weights "
            "differ; name the one it was trained with (--image-encoder, or image_encoder)"
        )
