"""From records to figures: scores per task, then averaged over tasks, with intervals; paired differences; cost."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation.metrics import task_means
from lorweb_jax.evaluation.records import MethodRecords, Records, difference
from lorweb_jax.evaluation.statistics import CONFIDENCE, estimate, paired
from lorweb_jax.evaluation.table import TRUTH

ALL = "all"  # the split of everything, where there are several
COST_HEAD = ("method", "seconds an image", "peak memory, GiB", "adapter's parameters", "device")


class Evaluated(NamedTuple):
    """What a report is made of. methods: whose records are complete, the truth last. records: {method: {id: record}}.
    incomplete: {method: how many images it has}. scores: {name: how it is described}."""

    setup: dict[str, Any]
    methods: dict[str, MethodRecords]
    records: dict[str, dict[str, dict]]
    incomplete: dict[str, int]
    scores: dict[str, dict[str, Any]]

    @property
    def triplets(self) -> dict[str, dict[str, Any]]:
        return self.setup["triplets"]

    def task(self, key: str) -> str:
        """split/task of a triplet."""
        about = self.triplets[key]
        return f"{about['split']}/{about['task']}"

    @property
    def splits(self) -> dict[str, list[str]]:
        """{split: ids}, "all" first where there are several."""
        splits: dict[str, list[str]] = {}
        for key, about in self.triplets.items():
            splits.setdefault(about["split"], []).append(key)
        return {ALL: list(self.triplets), **splits} if len(splits) > 1 else splits

    @property
    def compared(self) -> list[str]:
        """Methods but the truth; those of the user before copy and base."""
        names = [name for name in self.methods if name != TRUTH]
        return sorted(names, key=lambda name: self.methods[name].about["kind"] in ("copy", "base"))

    def by_task(self, method: str, score: str, keys: Sequence[str]) -> dict[str, float]:
        """{split/task: mean of the score over its triplets}, of those that have it."""
        records = self.records[method]
        tasks, values = [], []
        for key in keys:
            value = records[key]["scores"].get(score) if key in records else None
            if value is not None:
                tasks.append(self.task(key))
                values.append(value)
        return task_means(tasks, values)


def collect(folders: Sequence[Records], scores: dict[str, dict[str, Any]]) -> Evaluated:
    """All methods of the folders, which must be of the same triplets, sizes, seed and sampling.

    scores: those to show, by name. Methods that lack images are left out, and named. Raises UserError, with the
    difference, where two folders are not comparable, for two methods of one name, and where nothing is complete.
    """
    first, *others = folders
    for other in others:
        if what := difference(first.setup, other.setup):
            raise UserError(
                f"{first.folder} and {other.folder} can't be compared: {what}; evaluate again with the same "
                "options, in one folder"
            )
    methods: dict[str, MethodRecords] = {}
    for method in (method for records in folders for method in records.methods()):
        if method.name in methods and method.about["fingerprint"] != methods[method.name].about["fingerprint"]:
            raise UserError(f"two different methods are called {method.name!r}; rename one (NAME=PATH)")
        methods.setdefault(method.name, method)
    triplets = first.setup["triplets"]
    complete, incomplete = {}, {}
    for name, method in sorted(methods.items(), key=lambda item: item[0] == TRUTH):
        there = {key: record for key, record in method.read().items() if key in triplets}
        expected = [key for key, about in triplets.items() if name != TRUTH or about["truth"]]
        if all(key in there for key in expected):
            if there:
                complete[name] = there
        else:
            incomplete[name] = len(there)
    if not complete:
        raise UserError(
            f"no method in {first.folder} has all its images ({incomplete}); give the command that made them again"
        )
    return Evaluated(first.setup, {name: methods[name] for name in complete}, complete, incomplete, scores)


def figures(data: Evaluated, judged: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "conditions": data.setup["conditions"],
        "confidence": CONFIDENCE,
        "scores": data.scores,
        "skipped": len(data.setup["skipped"]),
        "incomplete": data.incomplete,
        "splits": {split: _split(data, keys) for split, keys in data.splits.items()},
        "per_task": _per_task(data),
        "cost": {name: cost(data, name) for name in data.methods},
        **({"judge": judged} if judged else {}),
    }


def _split(data: Evaluated, keys: Sequence[str]) -> dict[str, Any]:
    tasks = {name: {score: data.by_task(name, score, keys) for score in data.scores} for name in data.methods}
    differences = []
    names = data.compared
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            for score, about in data.scores.items():
                if result := paired(tasks[one][score], tasks[other][score], about["lower"]):
                    differences.append(
                        {
                            "score": score,
                            "method": one,
                            "against": other,
                            **result.difference.to_json(),
                            "tasks_won": result.tasks_won,
                            "tasks": result.tasks,
                        }
                    )
    return {
        "triplets": len(keys),
        "tasks": len({(data.triplets[key]["split"], data.triplets[key]["task"]) for key in keys}),
        "methods": {
            name: {score: result.to_json() for score, means in of.items() if (result := estimate(means))}
            for name, of in tasks.items()
        },
        "paired": differences,
    }


def _per_task(data: Evaluated) -> dict[str, dict[str, Any]]:
    """{split/task: {"triplets", method: {score: mean}}}."""
    counts = Counter(map(data.task, data.triplets))
    result: dict[str, dict[str, Any]] = {task: {"triplets": count} for task, count in counts.items()}
    for name in data.methods:
        for score in data.scores:
            for task, value in data.by_task(name, score, list(data.triplets)).items():
                result[task].setdefault(name, {})[score] = value
    return result


def cost(data: Evaluated, name: str) -> dict[str, Any]:
    """Median seconds an image, without the batches that were compiled first where there are others; the most memory."""
    costs = [record["cost"] for record in data.records[name].values()]
    steady = [each for each in costs if not each["compiled"]] or costs
    return {
        "seconds": float(np.median([each["seconds"] for each in steady])),
        "with_compilation": len(steady) == len(costs) and bool(costs[0]["compiled"]),
        "peak_bytes": max(each["peak_bytes"] for each in costs),
        "kind": data.methods[name].about["kind"],
        "parameters": data.methods[name].about.get("parameters", 0),
        "device": ", ".join(sorted({each["device"] for each in costs})),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of all splits, the paired differences of the first method, cost; what the figures mean."""
    parts = ["# Evaluation", "", conditions_line(results), ""]
    for split, of in results["splits"].items():
        parts += [f"## {split or 'results'}", "", counts_line(of), "", score_table(results, of), ""]
        rows = difference_rows(results, of)
        if rows:
            head = ["first − second", *(results["scores"][name]["label"] for name in rows[0][1])]
            body = [[title, *(cells[name] for name in rows[0][1])] for title, cells in rows]
            parts += ["Differences by task (mean, interval, share of tasks on which the first is better):", ""]
            parts += [_pipe(head, body), ""]
    if judged := results.get("judge"):
        parts += ["## judge", "", *judge_lines(judged), ""]
    parts += ["## cost", "", _pipe(COST_HEAD, cost_rows(results)), ""]
    parts += [f"- {about['label']}: {about['meaning']}." for about in results["scores"].values() if about["meaning"]]
    parts += [f"- Intervals: {results['confidence']:.0%}, bootstrap over tasks.", *notes(results)]
    return "\n".join(parts) + "\n"


def conditions_line(results: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {x}" for name, x in results["conditions"].items() if x is not None)


def counts_line(of: Mapping[str, Any]) -> str:
    return f"{of['triplets']} triplets of {of['tasks']} tasks; averaged per task, then over tasks."


def notes(results: Mapping[str, Any]) -> list[str]:
    """What is missing, in words."""
    lines = [
        f"- {name} has only {count} of its images and is left out." for name, count in results["incomplete"].items()
    ]
    if results["skipped"]:
        lines.append(f"- {results['skipped']} items of the data were skipped; setup.json lists them.")
    return lines


def heading(about: Mapping[str, Any]) -> str:
    """A score's label, and which way is better."""
    return f"{about['label']} {'↓' if about['lower'] else '↑'}"


def score_table(results: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    scores = results["scores"]
    head = ["method", *map(heading, scores.values())]
    body = [
        [name, *(cell(values.get(score), about["digits"]) for score, about in scores.items())]
        for name, values in of["methods"].items()
    ]
    return _pipe(head, body)


def cell(estimate: Mapping[str, Any] | None, digits: int, sign: str = "") -> str:
    if estimate is None:
        return "–"
    text = f"{estimate['mean']:{sign}.{digits}f}"
    if interval := estimate["interval_95"]:
        text += f" ({interval[0]:{sign}.{digits}f} to {interval[1]:{sign}.{digits}f})"
    return text


def difference_rows(results: Mapping[str, Any], of: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """(first − second, {score: cell}) of every pair that the first method is one of."""
    rows: dict[str, dict[str, str]] = {}
    first = of["paired"][0]["method"] if of["paired"] else None
    for each in of["paired"]:
        if each["method"] == first:
            text = f"{cell(each, results['scores'][each['score']]['digits'], '+')}, {each['tasks_won']:.0%}"
            rows.setdefault(f"{first} − {each['against']}", dict.fromkeys(results["scores"], "–"))[each["score"]] = text
    return list(rows.items())


def judge_lines(judged: Mapping[str, Any]) -> list[str]:
    """Two tables: scores, and forced choices."""
    lines = []
    if judged.get("scores"):
        head = ["method", "accuracy ↑", "consistency ↑", "answered", "unanswered"]
        lines += [_pipe(head, judged_scores(judged)), ""]
    if judged.get("choices"):
        head = ["choice", "wins (68 % interval)", "answered", "unanswered"]
        lines += [_pipe(head, judged_choices(judged)), ""]
    return [*lines, f"Judged by {judged['model']}."]


def judged_scores(judged: Mapping[str, Any]) -> list[list[str]]:
    """Rows of method, accuracy, consistency, answered, unanswered."""
    return [
        [
            name,
            *(cell(of.get(aspect), 2) for aspect in ("accuracy", "consistency")),
            *(str(of[count]) for count in ("answered", "unanswered")),
        ]
        for name, of in judged["scores"].items()
    ]


def judged_choices(judged: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the pair, the share that the first one won, answered, unanswered."""
    return [
        [
            f"{each['method']} against {each['against']}",
            "–" if each["rate"] is None else f"{each['rate']:.0%} ({each['low']:.0%} to {each['high']:.0%})",
            str(each["answered"]),
            str(each["unanswered"]),
        ]
        for each in judged["choices"]
    ]


def cost_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row of each method but the truth, under COST_HEAD."""
    return [
        [
            name,
            f"{of['seconds']:.3f}" + (" (with compilation)" if of["with_compilation"] else ""),
            f"{of['peak_bytes'] / 2**30:.2f}",
            f"{of['parameters']:,}",
            of["device"],
        ]
        for name, of in results["cost"].items()
        if name != TRUTH
    ]


def _pipe(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    return tabulate(
        [[str(x).replace("|", "\\|") for x in row] for row in body],
        headers=head,
        tablefmt="pipe",
        colalign=["left", *["right"] * (len(head) - 1)],
        disable_numparse=True,
    )
