"""What the experiments of basis.py drew: a sheet of unseen tasks, and a plot of differences task by task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.basis_methods import GROUPS, METHODS, REFERENCES, TITLES
from lorweb_jax.evaluation.evaluate import rows_sheet
from lorweb_jax.evaluation.records import Records
from lorweb_jax.images.io import write_image
from lorweb_jax.images.plots import drawn

SPLIT = "held_out_tasks"  # what the pictures are about
SCORE = "lpips"
WEBP_QUALITY = 35  # of pictures in docs/
TILE = 64  # px at least of an image's longer edge in the sheet
COLUMNS = {"base": "base", "basis": "basis", "published": "published", "lora_nr": "LoRA N·r", "lora_r": "LoRA r"}


def write_pictures(out: Path, results: Mapping[str, Any], reference: str, docs: Path | None = None) -> None:
    """Writes unseen.png and tasks.png of what there is into `out`, and beside the page `docs` as WebP, under its name.

    results: of `basis_tables.figures`.
    """
    there = results["methods"]
    methods = {name: there[name] for name in ("base", *GROUPS["main"].methods) if name in there}
    seeds = set(there[reference]["seeds"]) if reference in there else set()
    against = [
        name for name in methods if name in METHODS and name != reference and seeds.intersection(methods[name]["seeds"])
    ]
    images = {"unseen": unseen_sheet(out, methods)}
    if against:
        images["tasks"] = plot_tasks(methods, against, reference)
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
        axes.set_xlabel(f"LPIPS, {TITLES[reference]} − {TITLES[name]}", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    return drawn(figure)


def differences_by_task(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[float]]:
    """{unseen task: first − second by seed}, of the seeds that both have."""
    seeds = [seed for seed in first if seed in second]
    tasks = first[seeds[0]][SPLIT]
    return {task: [first[s][SPLIT][task][SCORE] - second[s][SPLIT][task][SCORE] for s in seeds] for task in tasks}
