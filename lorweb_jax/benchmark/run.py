"""Starts a process for each row, lets them take turns, and gathers what they measured."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from lorweb_jax.benchmark.flops import step_flops
from lorweb_jax.benchmark.setting import Setting
from lorweb_jax.errors import UserError
from lorweb_jax.transformer.flux import block_linears

# In the order of the table. "weights" is what torch's training rows do too; "inputs" goes backward through the
# frozen model without a basis, so that what "basis" takes longer is the basis's own.
ROWS = {"sample": {"base": "ours", "low-rank": "ours + basis, low-rank", "folded": "ours + basis, folded"},
        "train": {"weights": "ours, gradient of all weights", "inputs": "ours frozen, gradient of tokens",
                  "basis": "ours frozen, basis train step"}}
TORCH_ROWS = {"sample": {"eager": "diffusers", "compiled": "diffusers, torch.compile"},
              "train": {"eager": "diffusers, gradient of all weights",
                        "compiled": "diffusers, the same, torch.compile"}}
# (row, over which row): what the basis costs.
OVERHEADS = {"sample": (("low-rank", "base"), ("folded", "base")), "train": (("basis", "inputs"),)}
# Copies of the weights that a row may need at most, folding and gradients included.
_COPIES = {"sample": 1.5, "train": 3.0}


class Failed(Exception):
    """A row couldn't be measured; says why in one line."""


class Worker:
    """A measuring process (see worker.py)."""

    def __init__(self, row: str, setting: Setting, platform: str):
        request = {"row": row, "setting": setting.to_json(), "platform": platform}
        root = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            # Rows may share a device with each other, and with torch.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lorweb_jax.benchmark.worker", json.dumps(request)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)

    def reply(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise Failed(self._death())
        values = json.loads(line)
        if "failed" in values:
            raise Failed(values["failed"])
        return values

    def repeat(self) -> dict[str, Any]:
        try:
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(self._death()) from None
        return self.reply()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _death(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, probably for want of memory"
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines() or [f"its process ended with status {code}"]
        return lines[-1][:300]


def run_benchmark(setting: Setting, with_torch: bool) -> dict[str, Any]:
    """Everything measured, as --json writes it. Raises UserError where nothing can be measured at all."""
    say(f"measuring the ceilings of this machine, {setting.threads} threads")
    worker = Worker("ceilings", setting, "")
    try:
        found = worker.reply()
    except Failed as failure:
        raise UserError(f"the machine's ceilings could not be measured ({failure}); see whether jax itself runs "
                        "here") from None
    finally:
        worker.close()
    machine = found["machine"]
    if setting.attention == "cudnn" and machine["platform"] != "gpu":
        raise UserError(f"attention cudnn was asked for, but the device is {machine['device']}; use xla or auto", 2)
    if setting.attention == "auto":
        timed = {name: seconds for name, seconds in found["attention"].items() if isinstance(seconds, float)}
        setting = dataclasses.replace(setting, attention=min(timed, key=timed.get, default="xla"))

    names = ROWS[setting.what] | (TORCH_ROWS[setting.what] if with_torch else {})
    rows = {row: {"row": row, "name": name, "flops": step_flops(row, setting), "seconds": []}
            for row, name in names.items()}
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    for row in TORCH_ROWS[setting.what]:
        if missing and row in rows:
            rows[row]["skipped"] = f"{' and '.join(missing)} not installed"
    interleaved = memory_needed(setting, len(rows)) < 0.8 * machine["memory"]
    measure(rows, setting, machine["platform"], interleaved)
    for row in rows.values():
        summarise(row, found["ceilings"]["matmul"])
    return {"setting": setting.to_json(), "machine": machine, "ceilings": found["ceilings"],
            "attention_seconds": found["attention"], "interleaved": interleaved, "rows": list(rows.values()),
            "ratios": ratios(rows, setting.what, interleaved)}


def measure(rows: dict[str, dict], setting: Setting, platform: str, interleaved: bool) -> None:
    """Fills rows with seconds of every repeat: in turns (A B A B), so that drift hits all alike, or one by one."""
    measured = [row for row in rows.values() if "skipped" not in row]
    for group in [measured] if interleaved else [[row] for row in measured]:
        workers = {}
        try:
            for row in group:
                say(f"building and warming up: {row['name']}")
                workers[row["row"]] = worker = Worker(row["row"], setting, platform)
                attempt(row, worker.reply)
            for repeat in range(setting.repeats):
                for row in group:
                    if "skipped" not in row:
                        attempt(row, workers[row["row"]].repeat)
                say(f"repeat {repeat + 1} of {setting.repeats} done"
                    + ("" if interleaved else f": {group[0]['name']}"))
        finally:
            for worker in workers.values():
                worker.close()


def attempt(row: dict[str, Any], ask) -> None:
    """Adds a worker's answer to its row, or the reason why there is none."""
    try:
        values = ask()
    except Failed as failure:
        row["skipped"] = str(failure)
        return
    if "seconds" in values:
        row["seconds"].append(values.pop("seconds"))
    row.update(values)


def summarise(row: dict[str, Any], ceiling: float) -> None:
    """Adds the median, the rate and its share of the measured ceiling."""
    if "skipped" in row:
        return
    row["median_seconds"] = median(row["seconds"])
    row["flops_per_second"] = row["flops"] / row["median_seconds"]
    row["share_of_ceiling"] = row["flops_per_second"] / ceiling


def ratios(rows: dict[str, dict], what: str, interleaved: bool) -> dict[str, float]:
    """Times of pairs of rows divided, "row/other row": the median over repeats taken in turns, which drift leaves
    alone, or the ratio of the medians of rows that ran one after the other."""
    ours = next(iter(ROWS[what]))
    found = {}
    for row, other in (*OVERHEADS[what], *((ours, row) for row in TORCH_ROWS[what])):
        if any(name not in rows or "skipped" in rows[name] for name in (row, other)):
            continue
        pair = rows[row]["seconds"], rows[other]["seconds"]
        found[f"{row}/{other}"] = (median(a / b for a, b in zip(*pair)) if interleaved
                                   else median(pair[0]) / median(pair[1]))
    return found


def memory_needed(setting: Setting, count: int) -> float:
    """Bytes that so many rows need at once, roughly: weights are most of it, for any size but the smallest."""
    weights = sum(depth * i * o for depth, i, o in block_linears(setting.model).values())
    return count * _COPIES[setting.what] * weights * (2 if setting.dtype == "bfloat16" else 4)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
