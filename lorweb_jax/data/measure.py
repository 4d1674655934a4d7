"""How many grids a second the input pipeline reads, and where the time goes.

    python -m lorweb_jax.data.measure                        1024x512 JPEG pairs made for the purpose, grids of 512²
    python -m lorweb_jax.data.measure --data Relation252K    your own data

A grid is one analogy of a batch: two image files read, four images resized, condition and target put together. For
each number of worker processes the table gives grids a second by the clock and by the processors' time that the
program and its workers used; what came before the first few batches is left out.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from PIL import Image, features

from lorweb_jax.common.command_line import Parser, nonempty_path
from lorweb_jax.common.errors import run_command
from lorweb_jax.settings.rules import SHOWN_AT_ONCE, SIDE, WORKERS, Real, Whole, as_value

WARM_UP = 4  # batches that aren't counted: imports, worker processes, full buffers


class Rate(NamedTuple):
    """Of one run: grids a second by the clock, and milliseconds of processor time a grid (None: not known here)."""

    grids_per_second: float
    cpu_ms: float | None


def measure_input(root: str | Path, quadrant_size: int, workers: int, seconds: float, batch: int = 6) -> Rate:
    """Reads batches of a data set for so many seconds, after a warm-up."""
    from lorweb_jax.data.loader import AnalogyLoader  # grain imports jax

    with contextlib.closing(AnalogyLoader(root, batch, quadrant_size=quadrant_size, workers=workers)) as loader:
        for _ in range(WARM_UP):
            next(loader)
        start, used, count = time.perf_counter(), _cpu_seconds(), 0
        while (elapsed := time.perf_counter() - start) < seconds or not count:
            next(loader)
            count += batch
        now = _cpu_seconds()
    return Rate(count / elapsed, None if used is None or now is None else 1000 * (now - used) / count)


def _cpu_seconds() -> float | None:
    """Of this process and its workers; None where the system doesn't tell."""
    try:
        ticks = 0
        for pid in [os.getpid(), *(child.pid for child in multiprocessing.active_children())]:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")
    except OSError:
        return None


def breakdown(root: str | Path, quadrant_size: int, grids: int = 48) -> dict[str, float]:
    """Milliseconds of processor time a grid that each stage takes: medians."""
    from lorweb_jax.data.analogies import Analogies
    from lorweb_jax.data.layouts import read_tasks
    from lorweb_jax.data.problems import Problems
    from lorweb_jax.images import grid
    from lorweb_jax.images.resize import resize

    analogies, side = Analogies(read_tasks(root, Problems())), (quadrant_size, quadrant_size)
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable, *arguments):
        start = time.thread_time()
        result = function(*arguments)
        times.setdefault(name, []).append(1000 * (time.thread_time() - start))
        return result

    for index in np.linspace(0, len(analogies) - 1, grids).astype(int):
        images = timed("two files read and decoded", analogies[int(index)].read)
        small = timed("four images resized", lambda images: [resize(image, side) for image in images], images)
        timed(
            "two grids put together",
            lambda images: (grid.condition_grid(*images[:3]), grid.target_grid(*images)),
            small,
        )
    return {name: statistics.median(values) for name, values in times.items()}


def write_pairs(root: Path, height: int = 512, tasks: int = 4, pairs: int = 12) -> None:
    """Tasks of JPEG files "before | after", 2·height wide, with detail at all scales as photographs have."""
    from lorweb_jax.images.resize import resize

    random = np.random.default_rng(0)
    for task in range(tasks):
        folder = root / f"task{task}" / "Group1"
        folder.mkdir(parents=True)
        for pair in range(pairs):
            image = np.full((height, 2 * height, 3), 128.0)
            for level in range(2, 10):  # each octave of detail a little fainter than the one before
                noise = 70 * 2 ** (-level / 2) * random.normal(0, 1, (2**level, 2 ** (level + 1), 3))
                image += np.stack(
                    [resize(channel.astype(np.float32), (2 * height, height)) for channel in np.moveaxis(noise, -1, 0)],
                    -1,
                )
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{pair}.jpg", quality=92)
        (folder / "labels.json").write_text(
            json.dumps([{"img_name": f"{pair}.jpg", "edit_instruction": f"edit {task}"} for pair in range(pairs)])
        )


def _machine() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    turbo = f", libjpeg-turbo {features.version('libjpeg_turbo')}" if features.check("libjpeg_turbo") else ""
    return f"{os.cpu_count()} x {name}, Python {platform.python_version()}, Pillow {PIL.__version__}{turbo}"


def _report(root: Path, args: argparse.Namespace) -> None:
    size = args.quadrant_size
    print(
        f"{_machine()}\ngrids of {2 * size}x{2 * size}, batches of {args.batch}, {args.repeats} x {args.seconds:g} s "
        "each\n\n| workers | grids a second | spread | processor time a grid | grids a second per core |\n"
        "|--:|--:|--:|--:|--:|"
    )
    for workers in args.workers:
        runs = [measure_input(root, size, workers, args.seconds, args.batch) for _ in range(args.repeats)]
        rates, used = [run.grids_per_second for run in runs], [run.cpu_ms for run in runs]
        known = [milliseconds for milliseconds in used if milliseconds is not None]
        cpu = statistics.median(known) if len(known) == len(used) else None
        shown = "| |" if cpu is None else f"{cpu:.1f} ms | {1000 / cpu:.1f} |"
        print(
            f"| {workers} | {statistics.median(rates):.1f} | {min(rates):.1f} to {max(rates):.1f} | {shown}", flush=True
        )
    print("\nprocessor time of one grid's stages:")
    for name, milliseconds in breakdown(root, size).items():
        print(f"  {milliseconds:6.2f} ms  {name}")


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m lorweb_jax.data.measure", description=__doc__)
    parser.add_argument(
        "--data", type=nonempty_path, help="a data set, see docs/data.md (default: JPEG pairs made in a temporary one)"
    )
    parser.add_argument("--quadrant-size", type=int, default=256, help="pixels; the grid's side is twice that")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes (default: 0 1 2)")
    parser.add_argument("--seconds", type=float, default=10, help="of each run (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each number of workers (default: 3)")
    parser.add_argument("--batch", type=int, default=6, help="grids a batch (default: 6)")
    args = parser.parse_args(arguments)
    for value, name, rule in (
        (args.quadrant_size, "--quadrant-size", SIDE),
        (args.seconds, "--seconds", Real(0, 86_400, above=True)),
        (args.repeats, "--repeats", Whole(1, 1000)),
        (args.batch, "--batch", SHOWN_AT_ONCE),
        *((workers, "--workers", WORKERS) for workers in args.workers),
    ):
        as_value(value, name, rule)
    with contextlib.ExitStack() as closing:
        root = args.data
        if root is None:
            root = Path(closing.enter_context(tempfile.TemporaryDirectory()))
            write_pairs(root)
            sizes = [file.stat().st_size for file in root.rglob("*.jpg")]
            print(f"{len(sizes)} JPEG files of 1024x512, {sum(sizes) / len(sizes) / 1000:.0f} kB each")
        _report(root, args)


if __name__ == "__main__":
    run_command(main)
