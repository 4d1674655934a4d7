"""What the experiments of basis.py drew: a sheet of unseen tasks, differences task by task, curves over strength."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.basis_methods import PROBES, REFERENCES, SPLITS, TITLES
from lorweb_jax.evaluation.evaluate import rows_sheet
from lorweb_jax.evaluation.records import Records
from lorweb_jax.images.io import write_image
from lorweb_jax.images.plots import drawn

SPLIT = "held_out_tasks"  # what the pictures are about
SCORE = "lpips"
WEBP_QUALITY = 35  # of pictures in docs/
_EDIT = "clip_directional"
TILE = 64  # px at least of an image's longer edge in the sheet
COLUMNS = {
    "base": "base",
    "lora_r": "LoRA r",
    "lora_nr": "LoRA N·r",
    "published": "published",
    "basis": "basis",
    "adapted": "adapted",
}


def write_pictures(out: Path, results: Mapping[str, Any], reference: str, docs: Path | None = None) -> None:
    """Writes unseen.png, tasks.png and strength.png of what there is into `out`, and beside the page `docs` as WebP,
    under its name.

    results: of `basis_tables.figures`.
    """
    there = results["methods"]
    methods = {name: there[name] for name in COLUMNS if name in there}
    seeds = set(there[reference]["seeds"]) if reference in there else set()
    against = [name for name in methods if name not in ("base", reference) and seeds & set(methods[name]["seeds"])]
    images = {"unseen": unseen_sheet(out, methods)}
    if against:
        images["tasks"] = plot_tasks(methods, against, reference)
    if len(strengths := by_strength(there, reference)) > 2:
        images["strength"] = plot_strengths(strengths)
    for name, image in images.items():
        if image is not None:
            write_image(out / f"{name}.png", image)
            if docs is not None:
                write_image(docs.with_name(f"{docs.stem}_{name}.webp"), image, quality=WEBP_QUALITY)


def unseen_sheet(out: Path, methods: Mapping[str, Any]) -> np.ndarray | None:
    """The first analogy of each unseen task, what each method made of it with its first seed, and the truth; None where
    nothing was sampled."""
    seed = min(min(of["seeds"]) for of in methods.values())
    folder = out / "evaluation" / f"seed_{seed}"
    if not folder.is_dir():
        return None
    records = Records(folder)
    samples = {key: each for key, each in records.samples().items() if each.split == SPLIT}
    by_name = {kept.name: kept for kept in records.methods()}
    by_name |= {kept.about["kind"]: kept for kept in records.methods() if kept.about["kind"] in REFERENCES}
    images = {}
    for name, of in methods.items():
        kept = by_name.get(name if of["rate"] is None else f"{name}_{of['rate']}_{seed}")
        if kept is not None:
            there = kept.read()
            images[COLUMNS[name]] = [kept.image(key, there[key]) for key in samples]
    return rows_sheet(list(samples.values()), images, smallest=TILE)


def plot_tasks(methods: Mapping[str, Any], against: Sequence[str], reference: str) -> np.ndarray:
    """LPIPS of the reference less that of each other method, for each unseen task: a dot a seed, a bar their mean."""
    from matplotlib.figure import Figure

    figure = Figure((4.2 * len(against) + 1.4, 4.2), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(against), sharey=True, sharex=True, squeeze=False)[0]
    ascending: np.ndarray | None = None  # tasks in the order of the first panel
    for axes, name in zip(panels, against):
        differences = differences_by_task(methods[reference]["per_task"], methods[name]["per_task"])
        values = np.array(list(differences.values()))
        ascending = np.argsort(values.mean(1)) if ascending is None else ascending
        rows = np.arange(len(values))
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.barh(rows, values.mean(1)[ascending], color="C0", alpha=0.35)
        axes.plot(values[ascending], np.repeat(rows[:, None], values.shape[1], 1), ".", color="C0", markersize=4)
        axes.set_yticks(rows, [list(differences)[index] for index in ascending], fontsize=8)
        axes.set_xlabel(f"LPIPS, {TITLES[reference]} − {COLUMNS[name]}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return drawn(figure)


def differences_by_task(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[float]]:
    """{unseen task: first − second by seed}, of the seeds that both have."""
    seeds = [seed for seed in first if seed in second]
    tasks = first[seeds[0]][SPLIT]
    return {task: [first[s][SPLIT][task][SCORE] - second[s][SPLIT][task][SCORE] for s in seeds] for task in tasks}


def by_strength(methods: Mapping[str, Any], reference: str) -> dict[float, dict[str, dict[str, float]]]:
    """{strength: {split: {score: mean}}} of the reference's coefficients times so much, over the seeds that all have.

    0 is the base by itself, 1 the reference.
    """
    names = {0.0: "base", 1.0: reference}
    for name, probe in PROBES.items():
        kind, _, strength = probe.kind.partition(":")
        if kind == "strength" and probe.of == reference:
            names[float(strength)] = name
    there = {strength: methods[name]["per_task"] for strength, name in sorted(names.items()) if name in methods}
    seeds = set.intersection(*(set(of) for of in there.values())) if there else set()

    def means(of_tasks: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {score: float(np.mean([each[score] for each in of_tasks])) for score in ("lpips", "lpips_b", _EDIT)}

    return {
        strength: {split: means([task for seed in seeds for task in of[seed][split].values()]) for split in SPLITS}
        for strength, of in there.items()
        if seeds
    }


def plot_strengths(strengths: Mapping[float, Mapping[str, Mapping[str, float]]]) -> np.ndarray:
    """How far the result goes from b, against how far it is from the truth, and how far it goes the right way."""
    from matplotlib.figure import Figure

    figure = Figure((8.4, 3.4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, score, label in zip(panels, ("lpips", _EDIT), ("LPIPS to the truth", "CLIP direction")):
        for split, title in SPLITS.items():
            xs, ys = ([of[split][name] for of in strengths.values()] for name in ("lpips_b", score))
            axes.plot(xs, ys, ".-", label=title)
            for strength, x, y in zip(strengths, xs, ys):
                axes.annotate(f"{strength:g}", (x, y), (4, 4), textcoords="offset points", fontsize=7)
        axes.set_xlabel("LPIPS to b", fontsize=8)
        axes.set_ylabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].legend(fontsize=8)
    return drawn(figure)
