"""What was skipped while data was listed and read: kept, counted, shown and written."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from lorweb_jax.common.errors import UserError, printable, say
from lorweb_jax.common.outputs import write_file


def reason(error: Exception) -> str:
    """What an error says, for a `Problem`: a user's own in its words, others with their kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that was skipped: in which task, which file, why. Printable."""

    task: str
    file: str
    reason: str


class Notes:
    """Says what had to be left out of files, such as further frames: once for each kind of thing, with the first file.

    Data have thousands of files of one making. It may be called from several threads.
    """

    def __init__(self, say: Callable[[str], None] = say):
        self._said, self._say = set(), say

    def __call__(self, path: str, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._say(f"note: {printable(path)}: {what} (said of the first such file only)")


class Problems:
    """What was skipped while listing and reading data. Each problem is kept once, in the order of discovery.

    `substituted` counts the analogies that were replaced by another one because an image couldn't be read. `tell` says
    what had to be left out of images that are used (see `read_pair`).
    """

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}
        self.tell = Notes()
        self.substituted = 0

    def add(self, task: str, file: str, reason: str) -> bool:
        """Keep a problem, made printable; True if it is new."""
        problem = Problem(printable(task), printable(file), printable(reason))
        new = problem not in self._problems
        self._problems[problem] = None
        return new

    def __len__(self) -> int:
        return len(self._problems)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._problems)

    def summary(self, examples: int = 5) -> str:
        """A text for a person: the number of problems, the first few of them and the substituted analogies."""
        if not self._problems:
            return "no problems found in the data"
        tasks = len({problem.task for problem in self})
        lines = [
            f"{len(self)} item(s) of {tasks} task(s) skipped"
            + (f", {self.substituted} analogies replaced by others while reading" if self.substituted else "")
            + ":"
        ]
        lines += [f"  {p.task}: {p.file}: {p.reason}" for p in itertools.islice(self, examples)]
        if len(self) > examples:
            lines.append(f"  ... and {len(self) - examples} more")
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """Write all of it as JSON: {"skipped": [{task, file, reason}], "substituted": int}; UserError if it can't."""
        report = {"skipped": [dataclasses.asdict(problem) for problem in self], "substituted": self.substituted}
        write_file(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
