"""Starts a process for each row, lets them take turns, and gathers what they measured."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax.numpy as jnp

from benchmark.flops import step_flops
from benchmark.rows import BenchmarkRow, Pair, make_rows, memory_needed, pairs, varied, with_attention
from benchmark.setting import Setting
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.attention import resolve


class Failed(Exception):
    """A row couldn't be measured; says why in one line."""


class Worker:
    """A measuring process (see worker.py)."""

    def __init__(self, kind: str, setting: Setting, platform: str, quantizations: Sequence[str] = ()):
        request = {
            "kind": kind,
            "setting": setting.to_json(),
            "platform": platform,
            "quantizations": list(quantizations),
        }
        tools = Path(__file__).resolve().parents[1]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(tools.parent), str(tools), os.environ.get("PYTHONPATH")))),
            # Rows may share a device with each other, and with torch.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
            "OMP_NUM_THREADS": str(setting.threads),
            "MKL_NUM_THREADS": str(setting.threads),
        }
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmark.worker", json.dumps(request)],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
        )

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


def run_benchmark(variants: Sequence[Setting], with_torch: bool) -> dict[str, Any]:
    """Everything measured, as --json writes it. Raises UserError where nothing can be measured at all."""
    first = variants[0]
    say(f"measuring the ceilings of this machine, {first.threads} threads")
    worker = Worker("ceilings", first, "", [setting.quantization for setting in variants])
    try:
        found = worker.reply()
    except Failed as failure:
        raise UserError(
            f"the machine's ceilings could not be measured ({failure}); see whether jax itself runs here"
        ) from None
    finally:
        worker.close()
    platform = found["machine"]["platform"]
    variants = with_attention(variants, _attention(first, platform, found["attention"]))

    rows = make_rows(variants, with_torch)
    results = {
        row.key: {
            "row": row.key,
            "name": row.name,
            "quantization": row.setting.quantization,
            "moments": row.setting.moments,
            "remat": row.setting.remat,
            "flops": step_flops(row),
            "seconds": [],
            "cpu_seconds": [],
        }
        for row in rows
    }
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    for row in rows:
        if row.torch and (missing or platform not in ("cpu", "gpu")):
            results[row.key]["skipped"] = f"{' and '.join(missing)} not installed" if missing else "torch has no TPU"
    interleaved = memory_needed(rows) < 0.8 * found["machine"]["memory"]
    measure(rows, results, platform, interleaved)
    for row in rows:
        summarise(results[row.key], found["ceilings"], row)
    compared = pairs(rows)
    return {
        "setting": variants[0].to_json(),
        "varied": varied(variants),
        "machine": found["machine"],
        "ceilings": found["ceilings"],
        "attention_seconds": found["attention"],
        "interleaved": interleaved,
        "rows": list(results.values()),
        "ratios": ratios(results, compared, interleaved),
    }


def _attention(setting: Setting, platform: str, seconds: dict[str, float]) -> str:
    """The implementation to use: what was asked for, or of what was measured the fastest."""
    dtype, width = jnp.dtype(setting.dtype), setting.model.attention_head_dim
    if setting.attention != "auto":
        return resolve(setting.attention, platform, dtype, width)
    if not seconds:
        raise UserError(
            f"no attention runs on this {platform} at {setting.length} tokens and batch {setting.batch}, "
            "probably for want of memory; give fewer with --tokens or --batch"
        )
    return next(iter(seconds))


def measure(rows: Sequence[BenchmarkRow], results: dict[str, dict], platform: str, interleaved: bool) -> None:
    """Fills results with seconds of every repeat: in turns (A B A B), so that drift hits all alike, or one by one."""
    measured = [row for row in rows if "skipped" not in results[row.key]]
    for group in [measured] if interleaved else [[row] for row in measured]:
        workers = {}
        try:
            for row in group:
                say(f"building and warming up: {row.name}")
                workers[row.key] = worker = Worker(row.kind, row.setting, platform)
                attempt(results[row.key], worker.reply)
            for repeat in range(rows[0].setting.repeats):
                for row in group:
                    if "skipped" not in results[row.key]:
                        attempt(results[row.key], workers[row.key].repeat)
                say(
                    f"repeat {repeat + 1} of {rows[0].setting.repeats} done"
                    + ("" if interleaved else f": {group[0].name}")
                )
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
    for name in ("seconds", "cpu_seconds"):
        if name in values:
            row[name].append(values.pop(name))
    row.update(values)


def summarise(result: dict[str, Any], ceilings: dict[str, Any], row: BenchmarkRow) -> None:
    """Adds the median, the rate and its share of the ceiling of the dtype that the row's products are made in."""
    if "skipped" in result:
        return
    in_fp8 = row.setting.quantization == "fp8" and not row.torch
    result["median_seconds"] = median(result["seconds"])
    result["flops_per_second"] = result["flops"] / result["median_seconds"]
    result["share_of_ceiling"] = result["flops_per_second"] / ceilings.get("fp8" if in_fp8 else "", ceilings["matmul"])


def ratios(results: dict[str, dict], compared: Sequence[Pair], interleaved: bool) -> list[dict[str, Any]]:
    """Times of pairs of rows divided: the median over repeats taken in turns, which drift leaves alone, or the ratio
    of the medians of rows that ran one after the other."""
    found = []
    for pair in compared:
        if any("skipped" in results[key] for key in (pair.row, pair.other)):
            continue
        times = results[pair.row]["seconds"], results[pair.other]["seconds"]
        ratio = median(a / b for a, b in zip(*times)) if interleaved else median(times[0]) / median(times[1])
        found.append({"row": pair.row, "other": pair.other, "torch": pair.torch, "ratio": ratio})
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
