"""One row of the benchmark in a process of its own: its peak memory and its threads are its own, too.

Told on the command line what to measure (JSON); says on standard output, a JSON object a line, when it is ready and
what each repeat took. Reads "run" for another repeat and ends at the end of its input.
"""

import importlib
import json
import os
import resource
import sys
import time

# A repeat lasts at least this long, by doing several steps.
SHORTEST_REPEAT = 0.1


def main() -> None:
    request = json.loads(sys.argv[1])
    threads = request["setting"]["threads"]
    # Before jax and torch count the cores to make threads for.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    # What libraries print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**values) -> None:
        print(json.dumps(values), file=replies, flush=True)

    try:
        measure(request, reply)
    # Out of memory, no compiler, no such kernel: the other rows can still be measured.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reply(failed=f"{type(error).__name__}: {lines[0]}"[:300])
        raise


def measure(request: dict, reply) -> None:
    from benchmark.rows import TORCH_KINDS
    from benchmark.setting import Setting

    kind, setting = request["kind"], Setting(**request["setting"])
    if kind in TORCH_KINDS[setting.what]:
        module, arguments = "theirs", ("cuda" if request["platform"] == "gpu" else "cpu",)
    else:
        from lorweb_jax.processes.compiler_flags import set_compiler_flags

        set_compiler_flags(training=setting.what == "train")  # as the commands do
        import jax

        module, arguments = "ours", ()
        if setting.dtype == "float32":
            # As torch does: no reduced precision unless it is asked for.
            jax.config.update("jax_default_matmul_precision", "highest")
    if kind == "ceilings":
        from benchmark import ceilings

        reply(
            machine=ceilings.machine(setting.threads),
            ceilings=ceilings.ceilings(setting, request["quantizations"]),
            attention=ceilings.attention_seconds(setting) if setting.attention == "auto" else {},
        )
        return

    step = importlib.import_module(f"benchmark.{module}").make_step(kind, setting, *arguments)
    step.run(1)
    start = time.perf_counter()
    step.run(1)
    count = max(1, round(SHORTEST_REPEAT / (time.perf_counter() - start)))
    reply(**{name: value for name, value in step._asdict().items() if name != "run"})
    for _ in sys.stdin:
        start, busy = time.perf_counter(), time.process_time()
        step.run(count)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        reply(seconds=seconds / count, cpu_seconds=busy / count, peak_bytes=peak_bytes(module, request["platform"]))


def peak_bytes(module: str, platform: str) -> int:
    """The most device memory this process has held, or, on a CPU, its largest resident size."""
    if platform == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    if module == "theirs":
        import torch

        return torch.cuda.max_memory_allocated()
    import jax

    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    main()
