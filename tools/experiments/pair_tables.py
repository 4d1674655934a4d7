"""What the records of pair_styles.py say: a table at each method's best strength, and curves over the strength."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from experiments.runner import Record
from lorweb_jax.common.outputs import write_text
from lorweb_jax.evaluation.statistics import bootstrap_interval
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.images.io import write_image

MEASURES = {
    "lpips": "LPIPS to the truth ↓",
    "mse": "MSE to the truth ↓",
    "style": "style ↑",
    "content": "LPIPS to the base's picture",
}
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
    pairs = dict.fromkeys(pair for _, pair in trials)
    rows = []
    for pair in pairs:
        by_seed = [halves(each[measure])[half] for (_, of), each in trials.items() if of == pair and measure in each]
        if by_seed:
            rows.append(np.mean(by_seed, axis=0))
    return np.concatenate(rows) if rows else np.zeros(0)


def best(gathered: Curves, method: str) -> str:
    """The setting with the least distance to the truth on the first half of the prompts."""
    settings = [setting for name, setting in gathered if name == method]
    return min(settings, key=lambda setting: cells(gathered[method, setting], "lpips", 0).mean())


def write_tables(records: Sequence[Record], out: Path) -> str:
    """Writes table.md, table.json and curves.png; the table."""
    gathered = curves(records)
    methods = list(dict.fromkeys(method for method, _ in gathered))
    chosen = {method: best(gathered, method) for method in methods}
    table, figures = [], {}
    reference = gathered[methods[0], chosen[methods[0]]]
    for method in methods:
        trials = gathered[method, chosen[method]]
        row, figures[method] = [method, chosen[method]], {"setting": chosen[method]}
        for measure in MEASURES:
            values = cells(trials, measure, 1)
            low, high = bootstrap_interval(values)
            row.append(f"{values.mean():.3f} ({low:.3f}–{high:.3f})")
            figures[method][measure] = {"mean": float(values.mean()), "interval": [low, high]}
        # Paired: the same pairs, prompts and noise.
        low, high = bootstrap_interval(cells(trials, "lpips", 1) - cells(reference, "lpips", 1))
        figures[method]["lpips_against_first"] = [low, high]
        row.append("" if method == methods[0] else f"{low:+.3f} … {high:+.3f}")
        table.append(row)
    headers = ["method", "at", *MEASURES.values(), f"LPIPS against {methods[0]}, paired"]
    text = tabulate(table, headers=headers, tablefmt="pipe", disable_numparse=True)
    seconds = sum(record["seconds"] for record in records)
    text += f"\n\n{len(records)} trainings, {seconds / 60:.0f} min in all.\n"
    write_text(out / "table.md", text)
    write_json(out / "table.json", {"methods": figures, "seconds": seconds, "trials": len(records)})
    write_image(out / "curves.png", draw_curves(gathered, methods))
    return text


def draw_curves(gathered: Curves, methods: Sequence[str]) -> np.ndarray:
    """Style and distance to the truth against distance to the base's picture: a line a method, a point a setting."""
    import io

    from matplotlib.figure import Figure
    from PIL import Image

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
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return np.asarray(Image.open(file).convert("RGB"))
