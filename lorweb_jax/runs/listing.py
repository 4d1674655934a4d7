"""What run folders say of their runs: state, steps, losses, best score, pictures, command; as a table and a page."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lorweb_jax.common.errors import UserError, printable
from lorweb_jax.common.schema import read_json
from lorweb_jax.common.user_files import read_text
from lorweb_jax.images import svg
from lorweb_jax.images.io import read_image
from lorweb_jax.images.page import document, picture, table
from lorweb_jax.runs.checkpoints import complete_steps
from lorweb_jax.runs.folder import COMMAND, CONFIG, owner_alive
from lorweb_jax.runs.outcome import FILE as OUTCOME
from lorweb_jax.settings import config as configs

LOG, PICTURES, BEST = "log.txt", "pictures", "best.json"  # as training writes them
POINTS = 300  # of a curve
PICTURE = 480  # px of a picture's longer edge in the page
LOG_BYTES, COMMAND_BYTES = 256_000_000, 1_000_000
HEAD = ("run", "state", "steps", "loss", "best held-out", "at step", "job")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as its folder tells. state: running, finished, stopped, failed, or unreadable; `remark` says why."""

    folder: Path
    name: str
    state: str
    remark: str = ""
    job: str = ""
    steps: int = 0  # done, of the last line of the log or the newest checkpoint
    planned: int = 0
    losses: tuple[tuple[int, float], ...] = ()  # (step, mean since the line before)
    best: tuple[int, float] | None = None  # (step, score)
    pictures: tuple[Path, ...] = ()  # the newest of each name
    command: str = ""


def find_runs(folder: Path) -> list[Run]:
    """All runs in and below a folder, by path. UserError where there is no such folder, or none in it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one that runs lie in, such as runs", 2)
    found = []
    for place, folders, files in os.walk(folder):
        if CONFIG in files and {LOG, OUTCOME, ".lock"} & set(files):
            path = Path(place)
            found.append(read_run(path, str(path.relative_to(folder)) if path != folder else path.resolve().name))
            folders.clear()  # what lies in a run is its own, best/ too
        folders.sort()
    if not found:
        raise UserError(f"{folder} holds no run, a folder with {CONFIG} and {LOG}; name the one that runs lie in", 2)
    return found


def read_run(folder: Path, name: str) -> Run:
    try:
        config = configs.load(folder / CONFIG)
        losses = read_losses(folder / LOG)
        steps = max([0, *(step for step, _ in losses[-1:]), *complete_steps(folder)])
        state, remark = _state(folder, steps, config.train.steps)
        best = read_json(folder / BEST, dict[str, float]) if (folder / BEST).exists() else None
        return Run(
            folder,
            name,
            state,
            remark,
            config.job,
            steps,
            config.train.steps,
            losses,
            (int(best["step"]), best["score"]) if best else None,
            newest_pictures(folder / PICTURES),
            read_text(folder / COMMAND, COMMAND_BYTES).strip() if (folder / COMMAND).exists() else "",
        )
    except (UserError, OSError, KeyError, AttributeError) as error:
        return Run(folder, name, "unreadable", " ".join(str(error).split()))


def _state(folder: Path, steps: int, planned: int) -> tuple[str, str]:
    """(state, why)."""
    if owner := owner_alive(folder):
        return "running", f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    if (folder / OUTCOME).exists():
        outcome = read_json(folder / OUTCOME, dict[str, str])
        return outcome.get("state", "stopped"), outcome.get("error", "")
    # Killed; or of a version that recorded no outcome.
    return ("finished", "") if steps >= planned in complete_steps(folder) else ("stopped", "")


def read_losses(path: Path) -> tuple[tuple[int, float], ...]:
    """(step, loss) of each line of a log that has them."""
    if not path.exists():
        return ()
    lines = re.finditer(r"^step (\d{1,12})  (?:.*  )?loss (\S+)", read_text(path, LOG_BYTES), re.MULTILINE)
    return tuple((int(line[1]), float(line[2])) for line in lines if _is_number(line[2]))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def newest_pictures(folder: Path) -> tuple[Path, ...]:
    """Of pictures <name>_<step>.png the newest of each name."""
    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*_*.png")) if folder.is_dir() else ():
        newest[path.stem.rpartition("_")[0]] = path
    return tuple(newest.values())


def rows(runs: Iterable[Run]) -> list[list[str]]:
    """A row of HEAD for each run."""
    return [
        [
            printable(run.name),
            run.state,
            f"{run.steps:,}/{run.planned:,}" if run.planned else "–",
            f"{run.losses[-1][1]:.5g}" if run.losses else "–",
            f"{run.best[1]:.5g}" if run.best else "–",
            f"{run.best[0]:,}" if run.best else "–",
            run.job or "–",
        ]
        for run in runs
    ]


def page(runs: Sequence[Run]) -> str:
    """One HTML page: the table, then each run with its curve, newest pictures and command."""
    cells = [[escape(cell) for cell in row] for row in rows(runs)]
    for index, row in enumerate(cells):
        row[0] = f'<a href="#run{index}">{row[0]}</a>'
    return document("Runs", [table(HEAD, cells), *(_part(index, run) for index, run in enumerate(runs))])


def _part(index: int, run: Run) -> str:
    parts = [f'<h2 id="run{index}">{escape(printable(run.name))}</h2>']
    parts.append(f"<p><b>{run.state}</b> {escape(printable(run.remark))}</p>")
    if len(run.losses) > 1:
        parts.append(svg.dots(run.losses[:: -(-len(run.losses) // POINTS)], "step", "training loss"))
    figures = []
    for path in run.pictures:
        try:
            shown = picture(read_image(path), PICTURE)
        except (UserError, OSError) as error:
            shown = escape(str(error))
        figures.append(f"<figure>{shown}<figcaption>{escape(printable(path.stem))}</figcaption></figure>")
    if figures:
        parts.append(f'<div class="sheets">{"".join(figures)}</div>')
    if run.command:
        parts.append(f'<div class="row"><code>{escape(printable(run.command))}</code></div>')
    return "".join(parts)
