"""A plan as a table, and as json."""

import dataclasses
from typing import Any

import jax
from tabulate import tabulate

from lorweb_jax.planning import estimated_time, gpu_compiler
from lorweb_jax.planning.chips import GIB
from lorweb_jax.planning.figures import Plan
from lorweb_jax.planning.roofline import parts
from lorweb_jax.planning.topology import HOST
from lorweb_jax.training.state import count

_NAMES = {"base": "base weights, frozen", "optimizer": "optimizer's moments"}


Line = tuple[str, ...]  # what, its value, a remark


def table(plan: Plan) -> str:
    rows = [*_memory(plan), (), *_work(plan), (), *_traffic(plan), (), *_time(plan)]
    columns = tabulate(
        rows, tablefmt="plain", colalign=("left", "right", "left"), disable_numparse=True, preserve_whitespace=True
    )
    return "\n".join([*_heading(plan), "", *(line.rstrip() for line in columns.splitlines()), *_notes(plan)])


def _heading(plan: Plan) -> list[str]:
    program, config = plan.program, plan.program.job.config
    mesh = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    mix = "folded into" if "folded weights" in program.groups else "beside"
    what = (
        "a training step" if program.what == "train" else f"{program.steps} sampling steps, the mix {mix} the weights,"
    )
    micro = f" in {config.train.accumulate} parts" if program.what == "train" and config.train.accumulate > 1 else ""
    sizes = f"batch {program.batch}{micro}, {program.job.sequence} + {program.job.folder.text_tokens} tokens"
    if program.what == "train" and program.job.passes > 1:
        sizes += f", {program.job.passes} passes"
    how = [f"attention {program.job.planned_attention}", f"quantization {config.quantization}"]
    if config.offload != "none":
        how.append(f"offload {config.offload}")
    if program.what == "train":
        how = [f"remat {config.remat}", *how, f"moments {config.optimizer.moments}"]
    trained = program.gradients or program.groups["basis"]
    counts = " and ".join(
        f"{count(arrays):,} {word}"
        for arrays, word in ((program.groups["base"], "frozen"), (trained, "trained"))
        if arrays
    )
    return [
        f"{what} on {plan.target.name}: {program.mesh.size} devices, {mesh}",
        f"{sizes}; {', '.join(how)}",
        f"{counts} parameters",
    ]


def _memory(plan: Plan) -> list[Line]:
    how = "compiled" if plan.compiled else "arguments exact, the rest estimated"
    names = _NAMES | {"basis": f"{plan.program.job.named}, trained"}
    return [
        (f"bytes on a device ({how})", "GiB"),
        *((f"  {names.get(name, name)}", f"{size / GIB:.2f}") for name, size in plan.memory.items()),
        ("  peak", f"{plan.peak / GIB:.2f}"),
        ("  memory", f"{plan.capacity / GIB:.2f}", "it fits" if plan.fits else "it does not fit"),
        *([("blocks in the host's memory, streamed", f"{plan.host_memory / GIB:.2f}")] if plan.host_memory else []),
    ]


def _work(plan: Plan) -> list[Line]:
    work, steps = plan.work, plan.program.steps
    flops = {
        "model, from shapes": work.model,
        "frozen encoders": work.encoders,
        "recomputed (remat, attention)": work.recomputed,
    }
    return [
        ("products, all devices", "TFLOP", "an example" + " and step" * (steps > 1)),
        *(
            (f"  {name}", f"{count / 1e12:.1f}", f"{count / plan.program.batch / steps / 1e12:.1f}")
            for name, count in flops.items()
            if count > 0
        ),
    ]


def _traffic(plan: Plan) -> list[Line]:
    if not plan.traffic:
        return [("sent by a device", "none")]
    how = "compiled" if plan.compiled and plan.compiled.text else "expected of the sharding rules"
    return [
        (f"sent by a device ({how})", "GB", "collectives"),
        *(
            (
                f"  {kind}",
                f"{traffic.sent / 1e9:.3f}",
                f"{traffic.count:.0f}" + ", or more: in a loop whose length the program doesn't say" * traffic.at_least,
            )
            for kind, traffic in plan.traffic.items()
        ),
    ]


def _time(plan: Plan) -> list[Line]:
    roofline, chip = plan.roofline, plan.target.chip
    peaks = {
        "compute": f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16",
        "memory": f"{chip.bandwidth / 1e9:.0f} GB/s",
        "interconnect": f"{chip.interconnect / 1e9:.0f} GB/s one way",
    }
    if plan.host_memory:
        peaks["host"] = f"{chip.host / 1e9:.0f} GB/s from the host's memory, assumed"
    whole = f", all {plan.program.steps} steps" if plan.program.steps > 1 else ""
    rows: list[Line] = [(f"least time{whole}, if nothing else took any", "ms", "at a device's peak")]
    for name, peak in peaks.items():
        bottleneck = ", the bottleneck" * (name == roofline.bottleneck)
        rows.append((f"  {name}{bottleneck}", f"{1e3 * getattr(roofline, name):.1f}", peak))
    if plan.costs:
        rows += [(), *_estimated(plan)]
    if plan.compiled:
        rows.append(
            ("compiled in", f"{plan.compiled.seconds:.0f} s", f"{plan.compiled.core_seconds:.0f} s of CPU cores")
        )
    return rows


def _estimated(plan: Plan) -> list[Line]:
    """Milliseconds by what is done; of training also by phase, in the remark."""
    what = "a step" if plan.program.steps == 1 else f"all {plan.program.steps} steps"
    rows: list[Line] = [(f"time of {what}, as the compiler estimates", "ms")]
    done = {cost.kind for cost in plan.costs}
    total = {kind: phases for kind, phases in estimated_time.table(plan.costs).items() if kind in done}
    streamed = sum(total.pop(estimated_time.STREAMED, {}).values())
    for kind, phases in total.items():
        spent = [f"{phase} {1e3 * seconds:.1f}" for phase, seconds in phases.items() if seconds]
        rows.append((f"  {kind}", f"{1e3 * sum(phases.values()):.1f}", ", ".join(spent) * (len(spent) > 1)))
    whole = sum(sum(phases.values()) for phases in total.values())
    training = plan.program.what == "train"
    rows.append(("  all", f"{1e3 * whole:.1f}", "forward: with encoders and optimizer" * training))
    if streamed:
        rows += [
            (f"  {estimated_time.STREAMED}", f"{1e3 * streamed:.1f}", "in the background"),
            ("  together, at least", f"{1e3 * max(whole, streamed):.1f}", "if one hides the other"),
            ("  together, at most", f"{1e3 * (whole + streamed):.1f}", "if neither does"),
        ]
    return rows


def instructions(plan: Plan, count: int = 50) -> str:
    """The most expensive ones, a line each: milliseconds of all runs, runs, what it is, and where it comes from."""
    most = sorted(plan.costs, key=lambda cost: -cost.seconds)[:count]
    rows = [
        (f"{1e3 * cost.seconds:.3f}", f"x{cost.times}", cost.kind, cost.phase, cost.name, cost.place, cost.source)
        for cost in most
    ]
    return tabulate(rows, ("ms", "runs", "kind", "phase", "instruction", "line", "source"), tablefmt="plain") + "\n"


def _notes(plan: Plan) -> list[str]:
    program, divided = plan.program, parts(plan.program)
    if (
        plan.target.platform == "gpu"
        and not plan.compiled
        and not gpu_compiler.installed()
        and len(plan.target.devices) <= HOST
        and gpu_compiler.described(plan.target.chip.name)
    ):
        return [f"to have it compiled, {gpu_compiler.INSTALL.format(jax.__version__)}"]
    notes = (
        ["", "the estimated time takes for granted:", *(f"  {each}" for each in plan.assumptions)] if plan.costs else []
    )
    if divided == program.mesh.size:
        return notes
    return [
        *notes,
        f"the work is divided between {divided} of {program.mesh.size} devices: batch {program.batch} does not divide "
        "over data × fsdp",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Bytes, FLOPs and seconds."""
    program, compiled = plan.program, plan.compiled
    return {
        "topology": plan.target.name,
        "what": program.what,
        "devices": program.mesh.size,
        "mesh": dict(program.mesh.shape),
        "batch": program.batch,
        "steps": program.steps,
        "parameters": {group: count(program.groups[group]) for group in ("base", "basis")},
        "estimated": compiled is None,
        "memory": plan.memory,
        "host_memory": plan.host_memory,
        "peak": plan.peak,
        "capacity": plan.capacity,
        "fits": plan.fits,
        "flops": dataclasses.asdict(plan.work),
        "roofline": dataclasses.asdict(plan.roofline),
        "estimated_seconds": estimated_time.table(plan.costs) if plan.costs else None,
        "assumptions": plan.assumptions,
        "traffic": {kind: dataclasses.asdict(traffic) for kind, traffic in plan.traffic.items()},
        "compile_seconds": compiled and compiled.seconds,
        "compile_core_seconds": compiled and compiled.core_seconds,
    }
