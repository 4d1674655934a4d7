"""The table of an evaluation: one row per method, averaged per task and then over tasks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tabulate import tabulate

from lorweb_jax.common.outputs import write_file
from lorweb_jax.evaluation.metrics import mean, task_means, wilson_interval

TRUTH = "true b′"
# {score: (heading, digits after the point)}
COLUMNS = {
    "mse": ("MSE ↓", 4),
    "psnr": ("PSNR ↑", 2),
    "lpips": ("LPIPS ↓", 3),
    "lpips_b": ("LPIPS(b, result) ↓", 3),
    "clip_directional": ("CLIP-dir ↑", 3),
}
MEANING = {
    "mse": "MSE (pixels 0..1), PSNR (dB), LPIPS: result and true b′.",
    "lpips_b": "LPIPS(b, result): how much of b is preserved; copying scores 0, so read it beside CLIP-dir.",
    "clip_directional": "CLIP-dir: cosine of E(a′) − E(a) and E(result) − E(b).",
}


@dataclass(frozen=True)
class Table:
    """tasks: the task of each analogy. scores: {method: {score: one value per analogy}}, the truth among the methods.

    results: {method: the images it made, one per analogy}.
    """

    tasks: Sequence[str]
    scores: Mapping[str, Mapping[str, Sequence[float]]]
    results: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    def per_task(self) -> dict[str, dict[str, dict[str, float]]]:
        """{task: {method: {score: mean over its analogies}}}."""
        means = {
            method: {name: task_means(self.tasks, values) for name, values in scores.items()}
            for method, scores in self.scores.items()
        }
        return {
            task: {
                method: {name: by_task[task] for name, by_task in scores.items()} for method, scores in means.items()
            }
            for task in dict.fromkeys(self.tasks)
        }

    def rows(self) -> dict[str, dict[str, float]]:
        """{method: {score: mean over tasks of the task's mean}}."""
        by_task = self.per_task().values()
        return {
            method: {name: mean(task[method][name] for task in by_task) for name in scores}
            for method, scores in self.scores.items()
        }

    def wins(self, method: str, other: str, score: str = "lpips") -> tuple[float, float, float]:
        """How often `method` has the lower score of the two: (share of analogies, and its 68 % Wilson interval).

        A tie counts half.
        """
        first, second = (np.asarray(self.scores[name][score]) for name in (method, other))
        count = float((first < second).sum() + 0.5 * (first == second).sum())
        return count / len(first), *wilson_interval(count, len(first))

    def text(self) -> str:
        """The table in Markdown; below it what it means and how often the last method won."""
        rows = self.rows()
        names = list(next(iter(rows.values())))
        table = tabulate(
            [[method, *(f"{scores[name]:.{COLUMNS[name][1]}f}" for name in names)] for method, scores in rows.items()],
            headers=["method", *(COLUMNS[name][0] for name in names)],
            tablefmt="pipe",
            colalign=["left", *["right"] * len(names)],
            disable_numparse=True,
        )
        notes = [f"{len(self.tasks)} analogies of {len(set(self.tasks))} tasks, averaged per task, then over tasks."]
        notes += [text for name, text in MEANING.items() if name in names]
        notes += [
            f"{method} is closer to the truth than {other} (LPIPS) in {share:.0%} of the analogies, 68 % "
            f"interval {low:.0%} to {high:.0%}."
            for method, other, (share, low, high) in self._contests()
        ]
        return "\n".join([table, "", *notes])

    def _contests(self) -> list[tuple[str, str, tuple[float, float, float]]]:
        """The last method against each of the others."""
        *others, last = (method for method in self.scores if method != TRUTH)
        return [(last, other, self.wins(last, other)) for other in others]

    def to_json(self) -> dict:
        """Everything but the images: counts, rows, wins and the means of each task."""
        return {
            "analogies": len(self.tasks),
            "tasks": len(set(self.tasks)),
            "rows": self.rows(),
            "lpips_wins": [
                {"method": method, "against": other, "share": share, "interval_68": [low, high]}
                for method, other, (share, low, high) in self._contests()
            ],
            "per_task": {
                task: {"analogies": list(self.tasks).count(task), **methods}
                for task, methods in self.per_task().items()
            },
        }

    def write(self, folder: str | Path) -> None:
        """<folder>/table.json and table.md, each whole or not at all. UserError if they can't be written."""
        folder = Path(folder)
        write_file(
            folder / "table.json",
            (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace"),
        )
        write_file(folder / "table.md", (self.text() + "\n").encode(errors="backslashreplace"))
