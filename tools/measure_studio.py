"""Time an edit through the page beside the same edit by the API, and many tabs that ask at once.

  python tools/measure_studio.py --basis runs/basis                         what docs/studio.md shows
  python tools/measure_studio.py --basis lorweb.safetensors --pipeline FLUX.1-Kontext-dev --tabs 4 --steps 28

The page is served as by `python -m lorweb_jax.demo`, whose options these are beside those of its own; tabs are
clients that send over HTTP what a browser sends. Each kind of edit is made once beforehand, then they take turns.
"""

import hashlib
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from lorweb_jax import demo, read_image  # noqa: E402
from lorweb_jax.common.command_line import Parser, positive  # noqa: E402
from lorweb_jax.common.errors import run_command  # noqa: E402

PATIENCE = 3600  # seconds that an answer may take


class Tab:
    """A tab of its own that edits pictures: paths of a, a′ and b."""

    def __init__(self, address: str, pictures: Sequence[str], prompt: str, steps: int):
        from gradio_client import Client, handle_file

        self.client = Client(address, verbose=False, download_files=False, httpx_kwargs={"timeout": PATIENCE})
        a, a2, b = (handle_file(path) for path in pictures)
        self.rest = a, a2, [{"image": b, "caption": None}], prompt, 1, steps, 2.5, 1, ""

    def edit(self, seed: int) -> bytes:
        """The result as the page serves it, png."""
        import httpx

        result = self.client.submit(*self.rest, seed, api_name="/edit").result(timeout=PATIENCE)
        return httpx.get(result[2]["url"], timeout=PATIENCE).content


def latencies(studio, address: str, pictures: Sequence[str], prompt: str, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of an edit by the API and through the page, medians, and their ratio."""
    images, tab = [read_image(path) for path in pictures], Tab(address, pictures, prompt, steps)
    options = {"steps": steps, "folded": studio.folded, "max_size": studio.limits.size, "callback": lambda *_: None}
    ways = {"api": lambda: studio.pipeline.edit(*images, prompt, **options), "page": lambda: tab.edit(0)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, edit in ways.items():
            start = time.perf_counter()
            edit()
            if number:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | {"ratio": medians["page"] / medians["api"]}


def crowd(address: str, pictures: Sequence[str], prompt: str, steps: int, tabs: int) -> dict[str, Any]:
    """Tabs that edit at once, each with its own seed, out of a process of their own: how many results, how many
    different, seconds until the last, this process's resident memory in MB before, at most, and after."""
    before = most = _resident()
    start = time.perf_counter()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        asked = process.submit(_results, address, pictures, prompt, steps, tabs)
        while not asked.done():
            most = max(most, _resident())
            time.sleep(0.1)
        results = asked.result()
    seconds = time.perf_counter() - start
    return {
        "results": len(results), "different": len(set(results)), "seconds": seconds,
        "before": before, "most": most, "after": _resident(),
    }  # fmt: skip


def _results(address: str, pictures: Sequence[str], prompt: str, steps: int, tabs: int) -> list[str]:
    """A digest of what each tab gets."""
    with ThreadPoolExecutor(tabs) as threads:
        results = threads.map(lambda seed: Tab(address, pictures, prompt, steps).edit(seed), range(tabs))
        return [hashlib.sha256(result).hexdigest() for result in results]


def _resident() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024  # of kB


def main() -> None:
    parser = Parser(prog="python tools/measure_studio.py", description=__doc__)
    parser.add_argument("--tabs", type=positive, default=20)
    parser.add_argument("--crowds", type=positive, default=3, help="one after another, which shows what memory stays")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--steps", type=positive, default=12)
    own, rest = parser.parse_known_args()
    studio = demo.open_studio(demo.parse(rest))
    from benchmark.ceilings import machine
    from lorweb_jax.studio import page

    address = page.serve(page.build(studio), studio, port=7860)
    pictures = [str(ROOT / "docs" / "example" / f"{name}.png") for name in ("a", "a2", "b")]
    of_machine = machine(0)
    print(f"{of_machine['cores']} x {of_machine['device']}, jax {of_machine['jax']}", flush=True)
    setting = (pictures, "put a frame around it", own.steps)
    times = latencies(studio, address, *setting, own.repeats)
    print(
        f"an edit of {own.steps} steps, median of {own.repeats}: {times['api']:.2f} s by the API, "
        f"{times['page']:.2f} s through the page, ratio {times['ratio']:.2f}",
        flush=True,
    )
    for _ in range(own.crowds):
        told = crowd(address, *setting, own.tabs)
        print(
            f"{own.tabs} tabs at once: {told['results']} results, {told['different']} different, the last after "
            f"{told['seconds']:.0f} s; memory {told['before']:.0f} MB before, {told['most']:.0f} at most, "
            f"{told['after']:.0f} after",
            flush=True,
        )


if __name__ == "__main__":
    run_command(main)
