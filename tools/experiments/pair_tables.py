"""What the records of pair_styles.py say: tables at each method's best strengths, and curves over the strength."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from experiments.runner import Record
from lorweb_jax.common.outputs import write_text
from lorweb_jax.evaluation.statistics import bootstrap_interval
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.images.io import write_image
from lorweb_jax.images.plots import drawn

MEASURES = {
    "lpips": "LPIPS to the truth ↓",
    "mse": "MSE to the truth ↓",
    "style": "style ↑",
    "content": "LPIPS to the base's picture",
    "example": "LPIPS to the example ↑",
}
BASE = "base"  # its own pictures, without a style
# method and settings: {(seed, pair): distances by prompt}
Curves = dict[tuple[str, str], dict[tuple[int, str], dict[str, list[float]]]]


def curves(records: Sequence[Record]) -> Curves:
    """By (method, setting), such as ("lora, weight", "weight 0.5")."""
    gathered: Curves = {}
    for record in records:
        labels = record["labels"]
        for setting, distances in record["distances"].items():
            method = labels["method"] + (", weight" if setting.startswith("weight") else "")
            gathered.setdefault((method, setting), {})[labels["seed"], labels["pair"]] = distances
    return gathered


def halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The prompts by which a strength is chosen, and those that are reported."""
    return values[::2], values[1::2]


def cells(trials: dict, measure: str, half: int) -> np.ndarray:
    """A measure by pair and prompt, averaged over seeds [pairs · prompts]; of the pairs that have it."""
    rows = [means(trials, pair, measure, half) for pair in dict.fromkeys(pair for _, pair in trials)]
    return np.concatenate([row for row in rows if row is not None] or [np.zeros(0)])


def means(trials: dict, pair: str, measure: str, half: int) -> np.ndarray | None:
    """A measure of one pair by prompt, averaged over seeds [prompts]."""
    by_seed = [halves(each[measure])[half] for (_, of), each in trials.items() if of == pair and measure in each]
    return np.mean(by_seed, axis=0) if by_seed else None


def best(gathered: Curves, method: str) -> dict[str, str]:
    """{pair: the setting with the least distance to the truth, averaged over the first half of the prompts}; where the
    truth isn't known, the median of the settings of the other pairs, which are listed by their strength."""
    settings = {setting: trials for (name, setting), trials in gathered.items() if name == method}
    chosen: dict[str, str] = {}
    unknown = []
    for pair in dict.fromkeys(pair for trials in settings.values() for _, pair in trials):
        distances = {setting: means(trials, pair, "lpips", 0) for setting, trials in settings.items()}
        known = {setting: each.mean() for setting, each in distances.items() if each is not None}
        if known:
            chosen[pair] = min(known, key=known.__getitem__)
        else:
            unknown.append(pair)
    places = sorted(list(settings).index(setting) for setting in chosen.values())
    return chosen | dict.fromkeys(unknown, list(settings)[places[len(places) // 2]])


def at_best(gathered: Curves, method: str) -> tuple[dict[str, str], dict]:
    """What `best` says, and the distances at that setting: {(seed, pair): distances by prompt}, a pair after the other,
    whatever their settings, so that two methods can be compared cell by cell."""
    chosen = best(gathered, method)
    return chosen, {
        (seed, pair): distances
        for pair, setting in chosen.items()
        for (seed, of), distances in gathered[method, setting].items()
        if of == pair
    }


def write_tables(records: Sequence[Record], out: Path) -> str:
    """Writes table.md, table.json and curves.png; the tables. Differences are taken to the first record's method."""
    gathered = curves(records)
    methods = list(dict.fromkeys(method for method, _ in gathered))
    by_method = {method: at_best(gathered, method) for method in methods}
    reference = by_method[methods[0]][1]
    table, by_pair, figures = [], [], {}
    for method, (chosen, trials) in by_method.items():
        row, figures[method] = [method], {"setting": chosen}
        for measure in MEASURES:
            values = cells(trials, measure, 1)
            low, high = bootstrap_interval(values)
            row.append(f"{values.mean():.3f} ({low:.3f}–{high:.3f})")
            figures[method][measure] = {"mean": float(values.mean()), "interval": [low, high]}
        # Paired: the same pairs, prompts and noise.
        low, high = bootstrap_interval(cells(trials, "lpips", 1) - cells(reference, "lpips", 1))
        figures[method]["lpips_against_first"] = [low, high]
        table.append([*row, "" if method == methods[0] else f"{low:+.3f} … {high:+.3f}"])
        figures[method]["lpips_by_pair"] = {
            pair: float(values.mean()) for pair in chosen if (values := means(trials, pair, "lpips", 1)) is not None
        }
        by_pair.append(
            [method]
            + [
                f"{distance:.3f}" + (f" ({chosen[pair].split()[1]})" if " " in chosen[pair] else "")
                for pair, distance in figures[method]["lpips_by_pair"].items()
            ]
        )
    pairs = ["method", *figures[methods[0]]["lpips_by_pair"]]
    headers = ["method", *MEASURES.values(), f"LPIPS against {methods[0]}, paired"]
    text = "\n\n".join(
        [
            tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True),
            tabulate(by_pair, headers=pairs, tablefmt="pipe", disable_numparse=True),
        ]
    )
    seconds = [record["seconds"] for record in records if record["seconds"]]
    text += f"\n\n{len(seconds)} trainings, {sum(seconds) / 60:.0f} min in all.\n"
    write_text(out / "table.md", text)
    write_json(out / "table.json", {"methods": figures, "seconds": sum(seconds), "trials": len(seconds)})
    write_image(out / "curves.png", draw_curves(gathered, [name for name in methods if name != BASE]))
    return text


def draw_curves(gathered: Curves, methods: Sequence[str]) -> np.ndarray:
    """Style and distance to the truth against distance to the base's picture: a line a method, a point a setting."""
    from matplotlib.figure import Figure

    figure = Figure((9.0, 3.8), dpi=110, layout="constrained")
    for axes, measure in zip(figure.subplots(1, 2), ("style", "lpips")):
        for method in methods:
            points = []
            for (name, setting), trials in gathered.items():
                if name == method:
                    points.append((setting, cells(trials, "content", 1).mean(), cells(trials, measure, 1).mean()))
            axes.plot([x for _, x, _ in points], [y for *_, y in points], marker="o", markersize=3, label=method)
            for setting, x, y in points:
                axes.annotate(setting.split()[1], (x, y), fontsize=6, textcoords="offset points", xytext=(2, 2))
        axes.set_xlabel(MEASURES["content"])
        axes.set_ylabel(MEASURES[measure])
    axes.legend(fontsize=7)
    return drawn(figure)
