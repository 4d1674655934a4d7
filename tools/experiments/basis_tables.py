"""What the records of basis.py say: results.json with every figure, and tables of it in Markdown."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from experiments.basis_methods import GROUPS, SPLITS, TITLES, Group
from experiments.basis_pictures import write_pictures
from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_text
from lorweb_jax.evaluation.statistics import CONFIDENCE, crossed_interval
from lorweb_jax.files.safetensors_io import write_json

REFERENCE = "basis"  # what differences are taken from
TRAINING = "train"  # the split that chooses learning rates; tables have the others


class Shown(NamedTuple):
    label: str
    digits: int
    lower: bool  # whether less is better


SHOWN = {
    "mse": Shown("MSE ↓", 4, True),
    "lpips": Shown("LPIPS ↓", 3, True),
    "clip_directional": Shown("CLIP-dir ↑", 3, False),
    "alexnet_directional": Shown("AlexNet-dir ↑", 3, False),
}
BEGIN, END = "<!-- tables of tools/experiments/basis.py -->", "<!-- end of the tables -->"

ByTask = Mapping[str, Mapping[str, float]]  # {task: {score: mean}}


def mean_score(of_split: ByTask, score: str) -> float:
    """The mean over tasks of {task: {score: mean over its analogies}}."""
    return float(np.mean([scores[score] for scores in of_split.values()]))


def read_records(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((out / "records").glob("*.json"))]
    if not records:
        raise UserError(f"there are no records in {out}; run without --only-tables first")
    return records


def gather(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """{method: {seed: record}}, each method at one learning rate: the one with most seeds; among several, the one with
    the least LPIPS on training analogies with its first seed."""
    by_rate: dict[str, dict[float, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        labels = record["labels"]
        by_rate.setdefault(labels["method"], {}).setdefault(labels.get("rate", 0.0), {})[labels["seed"]] = record

    def preference(seeds: Mapping[int, Mapping[str, Any]]) -> tuple[int, float]:
        return -len(seeds), mean_score(seeds[min(seeds)]["scores"][TRAINING], "lpips")

    return {method: min(rates.values(), key=preference) for method, rates in by_rate.items()}


def matrix(by_seed: Mapping[int, Mapping[str, Any]], seeds: Sequence[int], split: str, score: str) -> np.ndarray:
    """A score [seeds, tasks]."""
    return np.array([[of[score] for of in by_seed[seed]["scores"][split].values()] for seed in seeds])


def estimated(values: np.ndarray) -> dict[str, Any]:
    """Of values [seeds, tasks]. over_seeds: standard deviation of the seeds' means, None of a single one."""
    spread = float(values.mean(1).std(ddof=1)) if len(values) > 1 else None
    interval = list(crossed_interval(values)) if values.shape[1] > 1 else None
    return {"mean": float(values.mean()), "interval_95": interval, "over_seeds": spread}


def figures(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json holds."""
    gathered = gather(records)
    methods = {}
    for method, by_seed in gathered.items():
        first = by_seed[min(by_seed)]
        splits = [split for split in first["scores"] if split != TRAINING]
        seeds = sorted(by_seed)
        methods[method] = {
            "title": TITLES[method],
            "rate": first["labels"].get("rate"),
            "parameters": first.get("parameters", 0),
            "seeds": seeds,
            "router": _mean_router([record.get("router") for record in by_seed.values()]),
            "minutes": float(np.mean([record.get("seconds", 0) for record in by_seed.values()])) / 60,
            "scores": {
                split: {score: estimated(matrix(by_seed, seeds, split, score)) for score in SHOWN} for split in splits
            },
            "per_task": {str(seed): by_seed[seed]["scores"] for seed in seeds},
        }
    pairs = [(name, REFERENCE) for name in methods if name != REFERENCE]
    pairs += dict.fromkeys(pair for group in GROUPS.values() for pair in group.pairs)
    differences = [
        each
        for one, other in pairs
        if one in gathered and other in gathered
        for each in _differences(one, other, gathered[one], gathered[other])
    ]
    return {"methods": methods, "differences": differences, "confidence": CONFIDENCE}


def _differences(
    method: str, against: str, of_method: Mapping[int, Mapping[str, Any]], of_other: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The first less the other, over the seeds that both have, by split and score."""
    common = sorted(of_method.keys() & of_other.keys())
    result = []
    for split in of_method[common[0]]["scores"] if common else ():
        if split == TRAINING:
            continue
        for score, about in SHOWN.items():
            two = [matrix(each, common, split, score) for each in (of_method, of_other)]
            by_task = (two[0] - two[1]).mean(0) * (1 if about.lower else -1)
            won = float(np.mean((by_task < 0) + 0.5 * (by_task == 0)))
            names = {"method": method, "against": against, "split": split, "score": score, "seeds": common}
            result.append({**names, **estimated(two[0] - two[1]), "tasks_won": won})
    return result


def _mean_router(routers: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    known = [router for router in routers if router]
    return {name: float(np.mean([router[name] for router in known])) for name in known[0]} if known else None


def write_tables(out: Path, docs: Path | None = None) -> str:
    """Writes results.json, results.md and pictures of the records in `out`; the Markdown goes into `docs` too, between
    its marks, the pictures beside it."""
    results = figures(read_records(out))
    text = markdown(results)
    write_json(out / "results.json", results)
    write_text(out / "results.md", text)
    write_pictures(out, results, REFERENCE, docs)
    if docs is not None:
        page = docs.read_text(encoding="utf-8")
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise UserError(f"{docs} has no {BEGIN} and {END}, between which the tables go; add these two lines")
        write_text(docs, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
    return text


def markdown(results: Mapping[str, Any]) -> str:
    parts = [part for group in GROUPS.values() for part in _group(results, group)]
    minutes = sum(of["minutes"] * len(of["seeds"]) for of in results["methods"].values())
    runs = sum(len(of["seeds"]) for of in results["methods"].values() if of["minutes"])
    return "\n".join([*parts, f"{runs} trainings shown, {minutes:.0f} minutes of training in all.", ""])


def _group(results: Mapping[str, Any], group: Group) -> list[str]:
    methods = results["methods"]
    names = [name for name in (*group.references, *group.methods, *group.probes) if name in methods]
    # Nothing is there but what the main comparison shows.
    main = {REFERENCE} if group is GROUPS["main"] else {*GROUPS["main"].methods, *GROUPS["main"].references}
    if main.issuperset(names):
        return []
    parts = [f"### {group.title}", ""]
    for split in methods[names[0]]["scores"]:
        tasks = len(next(iter(methods[names[0]]["per_task"].values()))[split])
        rows = [
            [of["title"], *(cell(of["scores"][split][score], about.digits) for score, about in SHOWN.items())]
            for of in (methods[name] for name in names)
        ]
        parts += [f"{SPLITS.get(split, split).capitalize()} ({tasks}):", ""]
        parts += [_pipe(["method", *(about.label for about in SHOWN.values())], rows), ""]
        rows = []
        for name, against in (*((name, REFERENCE) for name in names), *group.pairs):
            of = {
                each["score"]: each
                for each in results["differences"]
                if (each["method"], each["against"], each["split"]) == (name, against, split)
            }
            if of:
                cells = (f"{cell(of[s], about.digits, '+')}, {of[s]['tasks_won']:.0%}" for s, about in SHOWN.items())
                rows.append([f"{methods[name]['title']} − {methods[against]['title']}", *cells])
        if rows:
            parts += [_pipe(["difference, tasks won", *(about.label for about in SHOWN.values())], rows), ""]
    rows = [
        [
            of["title"],
            str(len(of["seeds"])),
            f"{of['rate']:g}",
            f"{of['parameters']:,}",
            f"{of['minutes']:.1f}",
            _members(of["router"]),
        ]
        for of in (methods[name] for name in names)
        if of["rate"]
    ]
    return [
        *parts,
        _pipe(["method", "seeds", "learning rate", "trained numbers", "minutes a training", "members in effect"], rows),
        "",
    ]


def _members(router: Mapping[str, float] | None) -> str:
    """Of one analogy, of one task, of all together, of how many."""
    if not router:
        return "–"
    return f"{router['one']:.1f}, {router['task']:.1f}, {router['all']:.1f} of {router['members']:.0f}"


def cell(estimate: Mapping[str, Any], digits: int, sign: str = "") -> str:
    """0.123 (0.120 to 0.126)"""
    text = f"{estimate['mean']:{sign}.{digits}f}"
    if interval := estimate["interval_95"]:
        text += f" ({interval[0]:{sign}.{digits}f} to {interval[1]:{sign}.{digits}f})"
    return text


def _pipe(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, headers=head, tablefmt="pipe", colalign=align, disable_numparse=True)
