"""What was skipped while data was listed and read: kept, counted, shown and written."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from lorweb_jax.outputs import write_file


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that was skipped: in which task, which file, why."""

    task: str
    file: str
    reason: str


class Problems:
    """What was skipped while listing and reading data. Each problem is kept once, in the order found.

    `substituted` counts the analogies that were replaced by another one because an image couldn't be read.
    """

    def __init__(self) -> None:
        self._found: dict[Problem, None] = {}
        self.substituted = 0

    def add(self, task: str, file: str, reason: str) -> bool:
        """Keep a problem; True if it is new."""
        problem = Problem(task, file, reason)
        new = problem not in self._found
        self._found[problem] = None
        return new

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def summary(self, examples: int = 5) -> str:
        """A text for a person: the number of problems, the first few of them and the substituted analogies."""
        if not self._found:
            return "no problems found in the data"
        tasks = len({problem.task for problem in self})
        lines = [f"{len(self)} item(s) of {tasks} task(s) skipped"
                 + (f", {self.substituted} analogies replaced by others while reading" if self.substituted else "")
                 + ":"]
        lines += [f"  {p.task}: {p.file}: {p.reason}" for p in itertools.islice(self, examples)]
        if len(self) > examples:
            lines.append(f"  ... and {len(self) - examples} more")
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Write all of it as JSON: {"skipped": [{task, file, reason}], "substituted": int}; UserError if it can't."""
        report = {"skipped": [dataclasses.asdict(problem) for problem in self], "substituted": self.substituted}
        write_file(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
