"""Figures as inline SVG, in the colours of the page around them."""

from collections.abc import Collection, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 420, 300, 52, 40, 12, 14
CELL = 14  # of a heat map


class Point(NamedTuple):
    """A mark with its number, and whiskers (low, high) of either coordinate where they are known."""

    label: str
    x: float
    y: float
    x_interval: Sequence[float] | None = None
    y_interval: Sequence[float] | None = None


class Axes:
    """Two axes with round ticks around the ranges (low, high), and where a value lies between them."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], x_title: str, y_title: str):
        self.x_ticks, self.y_ticks = ticks(*x_range), ticks(*y_range)
        self.x_title, self.y_title = escape(x_title), escape(y_title)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def figure(self, marks: Sequence[str]) -> str:
        """The axes with their grid, and marks upon it."""
        parts = [f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{self.y_title}">']
        for value in self.x_ticks:
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
        for value in self.y_ticks:
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
        middle, side = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
        parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{self.x_title}</text>')
        turned = f'transform="translate(12 {side:.0f}) rotate(-90)"'
        parts.append(f'<text {turned} text-anchor="middle">{self.y_title}</text>')
        return "".join([*parts, *marks, "</svg>"])


def _line(x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="whisker" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Numbered marks in the order of `points`, for a legend beside."""
    xs = [value for p in points for value in (p.x, *(p.x_interval or ()))]
    ys = [value for p in points for value in (p.y, *(p.y_interval or ()))]
    axes = Axes((min(xs), max(xs)), (min(ys), max(ys)), x_title, y_title)
    marks = []
    for number, p in enumerate(points):
        x, y = axes.x(p.x), axes.y(p.y)
        marks.append(f'<g class="m{number % 8}"><title>{escape(p.label)}: {p.x:.4g}, {p.y:.4g}</title>')
        if p.x_interval:
            low, high = map(axes.x, p.x_interval)
            marks.append(_line(low, high, y, y))
        if p.y_interval:
            low, high = map(axes.y, p.y_interval)
            marks.append(_line(x, x, low, high))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        marks.append(f'<text class="number" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number + 1}</text></g>')
    return axes.figure(marks)


def dots(
    points: Sequence[tuple[float, float]],
    x_title: str,
    y_title: str,
    labels: Sequence[str] = (),
    colours: Sequence[str] = (),
    least_height: float = 0.0,
    choices: Collection[int] = (),
) -> str:
    """Many small marks. labels: what each says when pointed at. colours: of each, as CSS has them; none: the page's.
    least_height: what part of the horizontal axis's span the vertical one has at least. choices: which marks a script
    can let a reader choose; these are buttons for keyboards and screen readers and have their number as data-index."""
    xs, ys = zip(*points)
    middle, half = (min(ys) + max(ys)) / 2, least_height * (max(xs) - min(xs)) / 2
    axes = Axes((min(xs), max(xs)), (min(*ys, middle - half), max(*ys, middle + half)), x_title, y_title)
    marks = []
    for i, (x, y) in enumerate(points):
        style = f' style="fill:{colours[i]}"' if colours else ' class="cell"'
        title = f"<title>{escape(labels[i])}</title>" if labels else ""
        button = ""
        if i in choices:
            label = f' aria-label="{escape(labels[i])}"' if labels else ""
            button = f' data-index="{i}" tabindex="0" role="button"{label}'
        circle = f'<circle cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.2" fill-opacity=".75"{style}/>'
        marks.append(f"<g{button}>{title}{circle}</g>")
    return axes.figure(marks)


def hues(count: int) -> list[str]:
    """Colours that differ as much as so many can, readable on light and dark."""
    return [f"hsl({360 * i / max(count, 1):.0f} {70 if i % 2 else 55}% {45 if i % 3 else 60}%)" for i in range(count)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers at equal distances, the first at most `low`, the last at least `high`."""
    span = max(high - low, 1e-9 * max(abs(low), abs(high)), 1e-9)
    step = 10 ** np.floor(np.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (factor * step) <= count)
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    if last == first:
        last += 1
    return [float(np.round(i * step, 12)) for i in range(first, last + 1)]


def heat_map(values: np.ndarray, rows: Sequence[str]) -> str:
    """values [rows, columns] ≥ 0 as cells, darker the higher; columns are numbered from 0."""
    values = np.asarray(values, np.float64)
    count, columns = values.shape
    left = 8 + 6.4 * max(len(row[:34]) for row in rows)
    width, height = left + CELL * columns + 4, 16 + CELL * count
    top = max(float(values.max()), 1e-12)
    parts = [
        f'<svg class="figure" viewBox="0 0 {width:.0f} {height}" style="max-width:{1.3 * width:.0f}px" role="img">'
    ]
    for column in range(0, columns, 1 if columns <= 10 else 2 if columns <= 40 else 5):
        parts.append(f'<text x="{left + CELL * (column + 0.5):.1f}" y="11" text-anchor="middle">{column}</text>')
    for i, row in enumerate(rows):
        parts.append(f'<text x="{left - 4:.1f}" y="{16 + CELL * i + 10}" text-anchor="end">{escape(row[:34])}</text>')
        for column, value in enumerate(values[i]):
            parts.append(
                f'<rect class="cell" x="{left + CELL * column:.1f}" y="{16 + CELL * i}" width="{CELL - 1}" '
                f'height="{CELL - 1}" fill-opacity="{max(0.04, value / top):.2f}">'
                f"<title>{escape(row)}, member {column}: {value:.3f}</title></rect>"
            )
    return "".join([*parts, "</svg>"])
