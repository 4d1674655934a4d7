"""Drawings of the same signs in several sets, and small photographs: what the small base is trained on.

`tools/pack_drawings.py` makes the file that `load_sets` reads, from published packages.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.user_files import regular_file

# "lines": OpenMoji's black outline twin of each drawing.
SETS = ("openmoji", "lines", "noto", "twemoji", "fluent", "photograph")
# How captions and instructions call a set's style.
STYLE_WORDS = {"openmoji": "openmoji", "lines": "line art", "noto": "noto", "twemoji": "twemoji", "fluent": "fluent"}
PHOTOGRAPH = SETS.index("photograph")
# Incremented when files of an older layout can't be read any more.
FORMAT = 1

# A subgroup of OpenMoji's table (or how it begins) -> what one of its drawings shows.
KINDS = {
    "face-": "face",
    "cat-face": "face",
    "monkey-face": "face",
    "heart": "heart",
    "emotion": "sign",
    "person-role": "worker",
    "person-sport": "athlete",
    "person-fantasy": "fantasy figure",
    "person": "person",
    "family": "family",
    "hand": "hand",
    "body-parts": "body part",
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-marine": "sea animal",
    "animal-bug": "insect",
    "animal-": "reptile",
    "plant-flower": "flower",
    "plant-": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-sweet": "dessert",
    "food-": "meal",
    "drink": "drink",
    "dishware": "household item",
    "place-geographic": "landscape",
    "place-": "building",
    "hotel": "household item",
    "transport-ground": "car",
    "transport-water": "ship",
    "transport-air": "aircraft",
    "transport-sign": "sign",
    "time": "clock",
    "sky-weather": "weather sign",
    "sport": "sports item",
    "game": "game",
    "award-medal": "medal",
    "event": "party item",
    "arts-crafts": "artwork",
    "clothing": "garment",
    "musical-instrument": "instrument",
    "music": "instrument",
    "computer": "computer",
    "phone": "computer",
    "book-paper": "book",
    "tool": "tool",
    "household": "household item",
    "office": "office item",
    "writing": "office item",
    "mail": "letter box",
    "money": "money",
    "lock": "lock",
    "medical": "medical item",
    "science": "instrument",
    "light-video": "lamp",
    "country-flag": "flag",
    "flag": "flag",
    "subdivision-flag": "flag",
    "zodiac": "zodiac sign",
    "geometric": "shape",
    "arrow": "arrow",
}


@dataclass(frozen=True)
class DrawingSets:
    """D drawings and photographs.

    images uint8 [D,H,W,4] RGBA, not premultiplied; names lower-case words; codes code points in hexadecimal ("1F34E",
    the same in every set), a photograph's picture; groups and subgroups as OpenMoji sorts signs; set_of int [D], an
    index into SETS; held_out bool [D], alike in every set; twins int [D, sets]: the index of the same code point's
    drawing in each set, −1 where there is none.
    """

    images: np.ndarray
    names: list[str]
    codes: list[str]
    groups: list[str]
    subgroups: list[str]
    set_of: np.ndarray
    held_out: np.ndarray
    twins: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def chosen(self, indices: np.ndarray) -> "DrawingSets":
        """Only these drawings, in this order; no index twice."""
        number = np.full(len(self) + 1, -1)  # the last one stands for "none", −1
        number[indices] = np.arange(len(indices))
        names, codes, groups, subgroups = (
            [column[i] for i in indices] for column in (self.names, self.codes, self.groups, self.subgroups)
        )
        return DrawingSets(
            self.images[indices],
            names,
            codes,
            groups,
            subgroups,
            self.set_of[indices],
            self.held_out[indices],
            number[self.twins[indices]],
        )

    def part(self, held_out: bool) -> "DrawingSets":
        """Only the held-out drawings, or only the others."""
        return self.chosen(np.flatnonzero(self.held_out == held_out))

    def kind(self, index: int) -> str:
        """What the drawing shows, in general: "fruit", "face", "building"; "sign" for what belongs nowhere."""
        subgroup = self.subgroups[index]
        return next((kind for start, kind in KINDS.items() if subgroup.startswith(start)), "sign")

    def captions(self, index: int) -> list[str]:
        """Captions for text to image, the plainest first; a drawing's last one names its kind alone."""
        name = with_article(self.names[index])
        if self.set_of[index] == PHOTOGRAPH:
            return [wording.format(name=name) for wording in PHOTOGRAPH_CAPTIONS]
        style = STYLE_WORDS[SETS[self.set_of[index]]]
        return [
            wording.format(name=name, style=style, a_style=with_article(style), kind=with_article(self.kind(index)))
            for wording in DRAWING_CAPTIONS
        ]


DRAWING_CAPTIONS = (
    "a drawing of {name} in {style} style",
    "{name} in {style} style",
    "{a_style} drawing of {name}",
    "a drawing of {name}",
    "a drawing of {kind} in {style} style",
)
PHOTOGRAPH_CAPTIONS = ("a small photograph of {name}", "a photograph of {name}", "a small photo of {name}")


def with_article(name: str) -> str:
    """ "red apple" -> "a red apple"; what looks like a plural ("grapes") is left alone."""
    last = name.split()[-1]
    if last.endswith("s") and not last.endswith(("ss", "us", "is")):
        return name
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def caption_words() -> list[str]:
    """Texts that hold every word of captions beside the drawings' names."""
    kinds = sorted(set(KINDS.values()) | {"sign"})
    return [
        *(with_article(kind) for kind in kinds),
        *STYLE_WORDS.values(),
        "a an drawing of in style",
        "a small photograph photo of",
    ]


def load_sets(path: str | Path) -> DrawingSets:
    """The drawings of a file that tools/pack_drawings.py made.

    Raises UserError if there is no such file or it is damaged.
    """
    path = regular_file(path, "make it with tools/pack_drawings.py (see its --help)")
    try:
        with np.load(path, allow_pickle=False) as file:
            index, data, ends = json.loads(file["index"].tobytes()), file["data"].tobytes(), file["ends"]
        images = [_decoded(data[start:end]) for start, end in zip([0, *ends[:-1]], ends)]
        rows = index["drawings"]
        names, codes, groups, subgroups = ([row[key] for row in rows] for key in ("name", "code", "group", "subgroup"))
        sets = DrawingSets(
            np.stack(images),
            names,
            codes,
            groups,
            subgroups,
            np.array([SETS.index(row["set"]) for row in rows]),
            np.array([row["held_out"] for row in rows]),
            _twins(rows),
        )
    except Exception as error:  # zipfile, zlib, numpy, json and Pillow each raise their own kinds
        raise UserError(
            f"{path} is not a file of drawings or is damaged ({error}); make it again with tools/pack_drawings.py"
        ) from None
    return sets


def _decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGBA"))


def _twins(rows: list[dict]) -> np.ndarray:
    """A photograph has none: its code names a picture, of which there are several parts."""
    by_code = {}
    for number, row in enumerate(rows):
        if row["set"] != "photograph":
            by_code.setdefault(row["code"], np.full(len(SETS), -1))[SETS.index(row["set"])] = number
    none = np.full(len(SETS), -1)
    return np.stack([none if row["set"] == "photograph" else by_code[row["code"]] for row in rows])
