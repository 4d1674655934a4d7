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


def scatter(points: Sequence[Point], x_title: str, y_title: str) -> str:
    """Numbered marks in the order of `points`, for a legend beside."""
    xs = [value for p in points for value in (p.x, *(p.x_interval or ()))]
    ys = [value for p in points for value in (p.y, *(p.y_interval or ()))]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def along(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - BOTTOM - TOP)

    parts = [f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)}">']
    for value in x_ticks:
        parts.append(
            f'<line class="grid" x1="{along(value):.1f}" x2="{along(value):.1f}" y1="{TOP}" y2="{up(y_ticks[0]):.1f}"/>'
        )
        parts.append(f'<text x="{along(value):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{up(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    side = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(12 {side:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    for number, p in enumerate(points):
        parts.append(f'<g class="m{number % 8}"><title>{escape(p.label)}: {p.x:.4g}, {p.y:.4g}</title>')
        if p.x_interval:
            low, high = map(along, p.x_interval)
            parts.append(
                f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{up(p.y):.1f}" y2="{up(p.y):.1f}"/>'
            )
        if p.y_interval:
            low, high = map(up, p.y_interval)
            parts.append(
                f'<line class="whisker" x1="{along(p.x):.1f}" x2="{along(p.x):.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
        x, y = along(p.x), up(p.y)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        parts.append(f'<text class="number" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{number + 1}</text></g>')
    return "".join([*parts, "</svg>"])


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
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = ticks(min(*ys, middle - half), max(*ys, middle + half))
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - BOTTOM - TOP
    parts = [f'<svg class="figure" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)}">']
    for value in x_ticks:
        x = LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * width
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + height}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    for value in y_ticks:
        y = TOP + height - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * height
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + width}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    parts.append(f'<text x="{LEFT + width / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    turned = f'transform="translate(12 {TOP + height / 2:.0f}) rotate(-90)"'
    parts.append(f'<text {turned} text-anchor="middle">{escape(y_title)}</text>')
    for i, (x, y) in enumerate(points):
        x = LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * width
        y = TOP + height - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * height
        style = f' style="fill:{colours[i]}"' if colours else ' class="cell"'
        title = f"<title>{escape(labels[i])}</title>" if labels else ""
        button = ""
        if i in choices:
            label = f' aria-label="{escape(labels[i])}"' if labels else ""
            button = f' data-index="{i}" tabindex="0" role="button"{label}'
        parts.append(f'<g{button}>{title}<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill-opacity=".75"{style}/></g>')
    return "".join([*parts, "</svg>"])


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
