"""Compiled programs timed on the device, with random weights; one set of them serves all of a kind."""

import collections
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from programs import graph, inputs_of, modulation_shapes, shapes, trainable_shapes
from results import say

from benchmark import ceilings, ours
from benchmark.random_weights import normal, random_basis, random_flux
from lorweb_jax.nn.attention import attend


class Weights:
    """The transformer's state of one kind at a time: its quantization, and whether blocks have arrays of their own."""

    def __init__(self):
        self._kind, self._state = None, None

    def of(self, setting):
        kind = setting.quantization, setting.unstacked
        if kind != self._kind:
            self._state = None  # first, so that never two lie there
            start = time.monotonic()
            _, self._state = nnx.split(random_flux(setting))
            jax.block_until_ready(self._state)
            say(f"weights made, {time.monotonic() - start:.1f} s")
            self._kind = kind
        _, abstract = graph(setting)
        return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(self._state))


def seconds_of(run, budget):
    """Milliseconds of one call: of 3 groups of calls, sorted, after one call that warms up."""
    run(1)
    start = time.monotonic()
    run(1)
    one = time.monotonic() - start
    count = max(1, min(20, int(budget / 3 / max(one, 1e-4))))
    milliseconds = []
    for _ in range(3):
        start = time.monotonic()
        run(count)
        milliseconds.append(1000 * (time.monotonic() - start) / count)
    return {"ms": [round(value, 3) for value in sorted(milliseconds)], "calls": 3 * count}


def measure(program, weights, results, out, tiny):
    """Time one program; its kernels too, where it is one of those that tell most."""
    setting = program.setting
    run = _runner(program, weights.of(setting))
    row = seconds_of(run, 5.0 if setting.what == "sample" else 9.0)
    median = row["ms"][1]
    row["TFLOP/s"] = round(program.flops / median / 1e9, 1)
    if setting.what == "train":
        row["ms a sample"] = round(median / setting.batch, 2)
    stats = jax.devices()[0].memory_stats() or {}
    row["peak GiB so far"] = round(stats.get("peak_bytes_in_use", 0) / 2**30, 2)
    results.put(program.section, program.name, row)
    if not tiny and "unstacked" in program.name:
        profile(run, results, f"{program.section} {program.name}", out)


def _runner(program, state):
    """What calls the program so many times and waits for the last."""
    setting, arguments = program.setting, inputs_of(program.setting)
    if setting.what == "sample":
        query, _ = arguments.pop("query"), arguments.pop("target")
        levels = {name: arguments.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
        wanted, adapters = modulation_shapes(setting, shapes(levels)), None
        modulations = jax.tree.map(lambda s: normal(1, s.shape, str(s.dtype), 0.1), wanted)
        if program.kind == "low-rank":
            basis = random_basis(setting, setting.dtype)
            adapters = basis.adapters(nnx.jit(lambda b, q: b.coefficients(q))(basis, query))
        return ours.repeated(program.compiled, state, arguments, modulations, adapters)
    if program.kind != "basis":
        return ours.repeated(program.compiled, state, arguments)
    trainable = {
        path: normal(seed, s.shape, "float32", 0.02)
        for seed, (path, s) in enumerate(trainable_shapes(setting)[0].items())
    }
    carried = [trainable, jax.jit(ours.paper_optimizer(setting.moments).init)(trainable)]

    def run(count):
        for _ in range(count):
            carried[0], carried[1], value = program.compiled(*carried, state, arguments)
        jax.block_until_ready((value, carried[0]))

    return run


def measure_ceilings(results, sample, train, deadline, tiny):
    """What the device reaches: a copy, attention by its implementation, products of the blocks' shapes."""
    source = jnp.ones(2**20 if tiny else 2**29, jnp.float32)
    copied = 2 * source.nbytes / ceilings.best_seconds(jax.jit(lambda x: x + 1), source)
    results.put("ceilings", "copy GB/s", round(copied / 1e9))
    del source
    for name, setting, backward in (("sample", sample, False), ("train", train, False), ("train", train, True)):
        _attention(results, name, setting, backward)
    d, m = sample.model.features, sample.length
    sizes = [(m, d, d), (m, d, 4 * d), (m, 4 * d, d), (m, 5 * d, d), (8192, 8192, 8192)]
    for dtype in [sample.dtype, *(["fp8"] if jax.default_backend() == "gpu" else [])]:
        for shape in sizes[: 2 if tiny else None]:
            if time.monotonic() > deadline - 10:
                return
            try:
                rate = ceilings._rate(shape, dtype)
            except Exception as error:
                results.failed(f"ceiling {dtype} {shape}", error)
                continue
            took = 2e3 * shape[0] * shape[1] * shape[2] / rate
            results.put("ceilings", f"{dtype} {list(shape)}", f"{rate / 1e12:.1f} T/s, {took:.4f} ms")


def _attention(results, name, setting, backward):
    shape = (setting.batch, setting.length, setting.model.num_attention_heads, setting.model.attention_head_dim)
    q, k, v = (normal(seed, shape, setting.dtype) for seed in range(3))

    def forward(q, k, v):
        return attend(q, k, v, setting.attention)

    def both(q, k, v):
        return jax.vjp(forward, q, k, v)[1](v)

    seconds = ceilings.best_seconds(jax.jit(both if backward else forward), q, k, v)
    flops = (7 if backward else 2) * 2 * setting.batch * setting.length**2 * setting.model.features
    results.put(
        "attention",
        f"{name} {'forward + backward' if backward else 'forward'} {list(shape)}",
        {"ms": round(1e3 * seconds, 3), "TFLOP/s": round(flops / seconds / 1e12, 1)},
    )


def profile(run, results, name, out):
    """The kernels of two calls by total time, from the profiler's trace."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            jax.profiler.start_trace(folder)
            run(2)
            jax.profiler.stop_trace()
            [file, *_] = Path(folder).rglob("*.xplane.pb")
            total, count, gaps = collections.Counter(), collections.Counter(), collections.Counter()
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if "GPU" not in plane.name or "CUPTI" in plane.name:
                    continue
                for line in plane.lines:
                    if "Stream" not in line.name:
                        continue
                    end = None
                    for event in sorted(line.events, key=lambda event: event.start_ns):
                        total[event.name] += event.duration_ns / 2e6
                        count[event.name] += 1
                        if end is not None and 0 < event.start_ns - end < 5e5:
                            gaps[event.name] += (event.start_ns - end) / 2e6
                        end = max(end or 0, event.start_ns + event.duration_ns)
        table = [[round(ms, 3), count[kernel] // 2, kernel[:120]] for kernel, ms in total.most_common(80)]
        (out / f"profile_{name.replace(' ', '_').replace(',', '')}.json").write_text(json.dumps(table, indent=0))
        waits = {kernel[:60]: round(ms, 3) for kernel, ms in gaps.most_common(6)}
        facts = {"kernels ms": round(sum(total.values()), 2), "gaps ms": round(sum(gaps.values()), 2), "before": waits}
        results.put("profile", name, facts | {"launches": sum(count.values()) // 2})
    except Exception as error:
        results.failed(f"profile {name}", error)
