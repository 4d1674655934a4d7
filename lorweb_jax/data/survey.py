"""What a data set holds, in figures, words and a picture; `python -m lorweb_jax.data.look` shows it."""

import collections
import dataclasses
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tabulate import tabulate

from lorweb_jax.common.errors import printable
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.data.analogies import Pair, Task
from lorweb_jax.data.problems import Problems, reason
from lorweb_jax.images.grid import other_shape, within
from lorweb_jax.images.pictures import sheet

Size = tuple[int, int]  # (width, height), pixels
RATIOS = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))  # that aspects are counted by, wide; and upright
ROWS, PROBLEMS, CAPTION = 200, 50, 100  # tasks and problems in a report; characters of a caption there
PER_TASK, SHOWN = 3, 128  # pairs of a task on the sheet; px of an image's longer edge


@dataclasses.dataclass(frozen=True)
class Survey:
    """tasks: with the pairs that can be read. before, after: of each pair in order; after is None where only headers
    were read. listed: pairs, readable or not."""

    tasks: list[Task]
    before: list[Size]
    after: list[Size | None]
    listed: int

    @property
    def pairs(self) -> list[Pair]:
        return [pair for task in self.tasks for pair in task.pairs]

    @property
    def analogies(self) -> int:
        """Ordered pairs of different pairs of a task: an epoch's examples."""
        return sum(len(task.pairs) * (len(task.pairs) - 1) for task in self.tasks)


def survey(tasks: Sequence[Task], problems: Problems, headers: bool = False) -> Survey:
    """Reads all images, or with `headers` those before the edit, of which the headers alone.

    Adds to `problems`: pairs that can't be read, and tasks with fewer than two others, which are left out.
    """

    def read(pair: Pair) -> tuple[Size, Size | None] | str:
        try:
            if headers:
                return pair.size(), None
            (h, w), (h2, w2) = (image.shape[:2] for image in pair.read(problems.tell))
            return (w, h), (w2, h2)
        except Exception as error:  # whatever is wrong with one image, the others are read
            return reason(error)

    listed = sum(len(task.pairs) for task in tasks)
    usable, before, after = [], [], []
    with (
        ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as threads,
        progress_bar("pairs", listed, 0, seconds=10.0, unit="") as bar,
    ):
        for task in tasks:
            good = []
            for pair, sizes in zip(task.pairs, threads.map(read, task.pairs)):
                bar.update()
                if isinstance(sizes, str):
                    problems.add(task.name, task.relative(pair), sizes)
                else:
                    good.append((pair, *sizes))
            if len(good) < 2:
                problems.add(task.name, "", f"{len(good)} readable pair(s), an analogy needs 2")
                continue
            usable.append(dataclasses.replace(task, pairs=tuple(pair for pair, _, _ in good)))
            before += [size for _, size, _ in good]
            after += [size for _, _, size in good]
    return Survey(usable, before, after, listed)


def report(result: Survey, problems: Problems, name: str, rate: float | None = None) -> str:
    """A page in Markdown. rate: examples a second that training does, for the hours of an epoch."""
    sections = [f"# {printable(name)}", _counts(result, problems)]
    if result.tasks:
        sections += [_time(result, rate), _sizes(result), _captions(result)]
    return "\n\n".join([*sections, _problems(problems), *([_tasks(result)] if result.tasks else [])]) + "\n"


def _counts(result: Survey, problems: Problems) -> str:
    text = (
        f"{len(result.tasks):,} tasks, {len(result.pairs):,} pairs of images, {result.analogies:,} analogies, which "
        f"are an epoch. Left out: {result.listed - len(result.pairs):,} pairs of those that are listed; problems: "
        f"{len(problems):,}, below."
    )
    if result.tasks:
        counts = [len(task.pairs) for task in result.tasks]
        text += f"\nPairs of a task: {min(counts):,} to {max(counts):,}, median {statistics.median(counts):g}."
    return text


def _time(result: Survey, rate: float | None) -> str:
    if rate is None:
        return "Hours of an epoch: give the examples that training does a second, --rate."
    return (
        f"At {rate:g} examples a second an epoch takes {_hours(result.analogies / rate)}; after "
        f"{_hours(len(result.pairs) / 2 / rate)} each pair has been shown once on average, as an example shows two."
    )


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 36 else f"{seconds:.2f} seconds"


def _sizes(result: Survey) -> str:
    aspects = collections.Counter(_ratio(size) for size in result.before)
    parts = [
        "## Sizes\n\n" + _table(("width x height, before", "pairs"), _most(f"{w}x{h}" for w, h in result.before)),
        _table(("aspect, nearest of", "pairs"), [(name, f"{count:,}") for name, count in aspects.most_common()]),
    ]
    if None not in result.after:
        unequal = sum(other_shape(after, before) for before, after in zip(result.before, result.after) if after)
        parts.append(f"In {unequal:,} pairs the image after has another shape than the one before, and is stretched.")
    if len(aspects) > 1:
        parts.append("With `config.data.buckets` batches keep these aspects; without, all become one (docs/data.md).")
    return "\n\n".join(parts)


def _ratio(size: Size) -> str:
    width, height = size
    across, down = min(
        [*RATIOS, *(ratio[::-1] for ratio in RATIOS[1:])],
        key=lambda ratio: abs(math.log(width / height * ratio[1] / ratio[0])),
    )
    return f"{across}:{down}"


def _captions(result: Survey) -> str:
    captions = [pair.instruction for pair in result.pairs]
    texts = [text for text in captions if text.strip()]
    counts = collections.Counter(texts)
    lines = [f"## Captions\n\n{len(captions) - len(texts):,} of {len(captions):,} pairs have an empty caption."]
    if texts:
        longest = max(texts, key=len)
        repeated = sum(count for count in counts.values() if count > 1)
        lines.append(
            f"{len(counts):,} different ones; {repeated:,} pairs share theirs with another. The longest has "
            f"{len(longest):,} characters: {printable(longest, CAPTION)!r}"
        )
        lines.append(_table(("most frequent", "pairs"), _most(printable(text, CAPTION) for text in texts)))
    return "\n\n".join(lines)


def _problems(problems: Problems) -> str:
    title = "## What can't be used\n\n"
    if not len(problems):
        return title + "Nothing: every file is usable."
    rows = [(each.task, each.file, each.reason) for each in problems]
    more = f"\n\n… and {len(rows) - PROBLEMS:,} more, in problems.json" if len(rows) > PROBLEMS else ""
    return title + _table(("task", "file", "reason"), rows[:PROBLEMS]) + more


def _tasks(result: Survey) -> str:
    rows = [
        (task.name, f"{len(task.pairs):,}", printable(task.pairs[0].instruction, CAPTION))
        for task in result.tasks[:ROWS]
    ]
    more = f"\n\n… and {len(result.tasks) - ROWS:,} more" if len(result.tasks) > ROWS else ""
    return "## Tasks\n\n" + _table(("task", "pairs", "first caption"), rows) + more


def _most(values: Iterable[str], count: int = 10) -> list[tuple[str, str]]:
    """The most frequent values, and how many others there are."""
    counter = collections.Counter(values)
    rows = [(value, f"{number:,}") for value, number in counter.most_common(count)]
    others = sum(number for _, number in counter.most_common()[count:])
    return [*rows, (f"{len(counter) - count:,} others", f"{others:,}")] if others else rows


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(cells, heads, tablefmt="github", disable_numparse=True)


def contact_sheet(result: Survey, tasks: int, problems: Problems) -> np.ndarray | None:
    """Some pairs of so many tasks, spread over all: before and after, a task a row; uint8 [H, W, 3], None for none."""
    rows = []
    for task in result.tasks[:: -(-len(result.tasks) // tasks)] if result.tasks else []:
        images = []
        for pair in task.pairs[:PER_TASK]:
            try:
                images += [within(image, SHOWN) for image in pair.read(problems.tell)]
            except Exception as error:  # damaged behind its header
                problems.add(task.name, task.relative(pair), reason(error))
        if images:
            rows.append((f"{task.name}: {task.pairs[0].instruction}", images))
    return sheet(rows, ("before", "after") * PER_TASK) if rows else None
