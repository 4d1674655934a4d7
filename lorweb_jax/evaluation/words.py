"""What stands on the command line of an evaluation, without any import that takes time."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.rules import STRENGTH, as_value

STYLE = "style:"
WORDS = ("base", "copy")  # methods that need no file
# What a basis does with other coefficients than its router's (evaluation/probes.py), by the word before its path.
PROBES = {
    "wrong": "wrong pair",
    "mean": "mean coefficients",
    "adapted": "adapted",
    "pairs": "several pairs",
    "strength": "strength",
}


class Named(NamedTuple):
    """A method as it was named. text: without its name. path: of its file or folder, None of copy and base."""

    name: str | None
    text: str
    path: str | None
    strength: float | None = None  # of a style, or of the probe "strength"
    probe: str = ""  # of PROBES

    @property
    def is_style(self) -> bool:
        return self.text.startswith(STYLE)


def parse_method(text: str) -> Named:
    """[NAME=]SOURCE, of which SOURCE is copy, base, a path, style:PATH[:STRENGTH], PROBE:PATH or strength:NUMBER:PATH.

    An = in a path that is there begins no source. UserError for an empty name, source or strength.
    """
    name, sign, source = text.partition("=")
    if not sign or Path(text).exists() or "/" in name or name.startswith((STYLE, *(f"{probe}:" for probe in PROBES))):
        name, source = None, text
    elif not name.strip() or not source.strip():
        raise UserError(f"the method {text!r} is no NAME=PATH; give one such as ours=runs/basis", 2)
    if source in WORDS:
        return Named(name, source, None)
    probe, sign, path = source.partition(":")
    if sign and probe in PROBES and not Path(source).exists():
        strength = None
        if probe == "strength":
            number, sign, path = path.partition(":")
            strength = _strength(number, f"{text!r} begins with", "strength:0.5:runs/basis")
        if not path:
            raise UserError(f"the method {text!r} names no basis; give one such as {probe}:runs/basis", 2)
        return Named(name, source, path, strength, probe)
    if not source.startswith(STYLE):
        return Named(name, source, source)
    path, strength = source.removeprefix(STYLE), None
    head, sign, last = path.rpartition(":")
    if sign and not Path(path).exists():
        path, strength = head, _strength(last, f"{source} ends in", f"{STYLE}{head}:4")
    if not path:
        raise UserError(f"the method {text!r} names no style; give one such as {STYLE}runs/pair:4", 2)
    return Named(name, source, path, strength)


def _strength(number: str, where: str, example: str) -> float:
    try:
        strength = float(number)
    except ValueError:
        raise UserError(f"{where} {number!r}, which is no strength; give one such as {example}", 2) from None
    return as_value(strength, "a method's strength", STRENGTH)


def parse_data(words: Sequence[str]) -> list[tuple[str, str]]:
    """[SPLIT=]FOLDER each -> (split or "", folder). UserError for an empty one and for two of one split."""
    data = []
    for word in words:
        split, sign, folder = word.partition("=")
        if not sign or Path(word).exists() or "/" in split:
            split, folder = "", word
        if not folder.strip():
            raise UserError(f"--data {word!r} is no SPLIT=FOLDER; give one such as unseen=data/unseen", 2)
        data.append((split, folder))
    names = [split or Path(folder).name for split, folder in data]
    if len(set(names)) < len(names):
        raise UserError(f"two data folders are of one split, {', '.join(names)}; name them: SPLIT=FOLDER", 2)
    return data


def is_own(judge: str) -> bool:
    """Whether a judge is FILE.py:FUNCTION[=ARGUMENT] and no address."""
    return ".py:" in judge.partition("=")[0]
