"""Figures of numbers, drawn by matplotlib."""

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lorweb_jax.common.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
ROW, CHARACTER = 0.2, 0.075  # height of a row, width of a character of a column's label, inches
LABEL, TITLE = 30, 80  # characters of a label and of the title that are shown


def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = "") -> np.ndarray:
    """values [len(rows), len(columns)] as cells with labels, white (low) to dark blue (high) -> uint8 [H, W, 3]."""
    from matplotlib.figure import Figure  # takes half a second, and few commands draw

    rows, columns = ([printable(label, LABEL) for label in labels] for labels in (rows, columns))
    width = max(0.22, CHARACTER * max(map(len, columns))) * len(columns)
    height = ROW * len(rows)
    figure = Figure((width, height), dpi=DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))  # the file grows by what the labels take
    cells = axes.pcolormesh(np.asarray(values, np.float64), cmap="Blues", edgecolors="0.88", linewidth=0.5)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    text = {"fontsize": 8, "parse_math": False}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **text)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, **text)
    axes.set_title(printable(title, TITLE), loc="left", **text)
    axes.tick_params(length=0)
    scale = figure.add_axes((0.0, -0.15 / height, 1.0, 0.08 / height))
    figure.colorbar(cells, scale, orientation="horizontal").ax.tick_params(labelsize=7)
    return drawn(figure)


def plane(place: np.ndarray, labels: Sequence[str], title: str = "") -> np.ndarray:
    """Points [b, 2] as dots, coloured by label, each label once beside the mean of its dots -> uint8 [H, W, 3]."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((7.0, 5.5), dpi=DPI)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(labels))
    for number, name in enumerate(names):
        own = place[[i for i, label in enumerate(labels) if label == name]]
        colour = colormaps["hsv"](number / len(names))
        axes.scatter(own[:, 0], own[:, 1], s=14, color=colour, alpha=0.8, linewidths=0)
        axes.annotate(printable(name, LABEL), own.mean(0), fontsize=6, color="0.25", parse_math=False)
    axes.set_title(printable(title, TITLE), loc="left", fontsize=8, parse_math=False)
    axes.tick_params(labelsize=7)
    return drawn(figure)


def drawn(figure: "Figure") -> np.ndarray:
    """A matplotlib figure -> uint8 [H, W, 3], cut to what is drawn."""
    with io.BytesIO() as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # of other scripts; a box is drawn
        figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.05)
        return np.asarray(Image.open(file).convert("RGB"))
