"""A plan as a table, and as json."""

import dataclasses
from typing import Any

from lorweb_jax.planning.chips import GIB
from lorweb_jax.planning.figures import Plan
from lorweb_jax.planning.roofline import parts
from lorweb_jax.planning.shapes import tokens
from lorweb_jax.training.state import count

_NAMES = {"base": "base weights, frozen", "basis": "basis, trained", "optimizer": "optimizer's moments"}


def table(plan: Plan) -> str:
    return "\n".join([*_heading(plan), "", *_memory(plan), "", *_work(plan), "", *_traffic(plan), "", *_time(plan)])


def _heading(plan: Plan) -> list[str]:
    program, config = plan.program, plan.program.job.config
    mesh = " × ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
    mix = "folded into" if "folded weights" in program.groups else "beside"
    what = (
        "a training step" if program.what == "train" else f"{program.steps} sampling steps, the mix {mix} the weights,"
    )
    sizes = f"batch {program.batch}, {2 * tokens(program.job)} + {program.job.folder.text_tokens} tokens"
    how = [f"attention {program.job.planned_attention}", f"quantization {config.quantization}"]
    if program.what == "train":
        how = [f"remat {config.remat}", *how, f"moments {config.optimizer.moments}"]
    counts = " and ".join(
        f"{count(program.groups[group]):,} {word}"
        for group, word in (("base", "frozen"), ("basis", "trained"))
        if program.groups[group]
    )
    return [
        f"{what} on {plan.target.name}: {program.mesh.size} devices, {mesh}",
        f"{sizes}; {', '.join(how)}",
        f"{counts} parameters",
    ]


def _memory(plan: Plan) -> list[str]:
    how = "compiled" if plan.compiled else "arguments exact, the rest estimated"
    lines = [_line(f"bytes on a device ({how})", "GiB")]
    lines += [_line(f"  {_NAMES.get(name, name)}", f"{size / GIB:.2f}") for name, size in plan.memory.items()]
    verdict = "it fits" if plan.fits else "it does not fit"
    return [*lines, _line("  peak", f"{plan.peak / GIB:.2f}"), _line("  memory", f"{plan.capacity / GIB:.2f}", verdict)]


def _work(plan: Plan) -> list[str]:
    work, batch = plan.work, plan.program.batch
    rows = [
        ("model, from shapes", work.model),
        ("frozen encoders", work.encoders),
        ("computed again (remat, attention)", work.recomputed),
    ]
    lines = [_line("products, all devices", "TFLOP", "an example" + (" and step" if plan.program.steps > 1 else ""))]
    return lines + [
        _line(f"  {name}", f"{flops / 1e12:.1f}", f"{flops / batch / plan.program.steps / 1e12:.1f}")
        for name, flops in rows
        if flops > 0
    ]


def _traffic(plan: Plan) -> list[str]:
    how = "compiled" if plan.compiled and plan.compiled.text else "expected of the sharding rules"
    lines = [_line(f"sent by a device ({how})", "GB", "collectives")]
    lines += [
        _line(
            f"  {kind}",
            f"{found.sent / 1e9:.3f}",
            f"{found.count:.0f}" + ", or more: in a loop whose length the program doesn't say" * found.at_least,
        )
        for kind, found in plan.traffic.items()
    ]
    return lines if plan.traffic else [_line("sent by a device", "none")]


def _time(plan: Plan) -> list[str]:
    roofline, program = plan.roofline, plan.program
    chip = plan.target.chip
    rows = [
        ("compute", f"{chip.flops / 1e12:.0f} TFLOP/s bfloat16"),
        ("memory", f"{chip.bandwidth / 1e9:.0f} GB/s"),
        ("interconnect", f"{chip.interconnect / 1e9:.0f} GB/s one way"),
    ]
    whole = f", all {program.steps} steps" if program.steps > 1 else ""
    lines = [_line(f"least time{whole}, if nothing else took any", "ms", "at a device's peak")]
    lines += [
        _line(
            f"  {name}" + (", the bottleneck" if name == roofline.bottleneck else ""),
            f"{1e3 * getattr(roofline, name):.1f}",
            peak,
        )
        for name, peak in rows
    ]
    if (divided := parts(program)) < program.mesh.size:
        lines.append(
            f"  the work is divided between {divided} of {program.mesh.size} devices: batch {program.batch} "
            "does not divide over data × fsdp"
        )
    if plan.compiled:
        lines.append(
            _line("compiled in", f"{plan.compiled.seconds:.0f} s", f"{plan.compiled.core_seconds:.0f} s of CPU cores")
        )
    return lines


def _line(name: str, *values: str) -> str:
    return f"{name:<48}" + "".join(f"{value:>10}" if at == 0 else f"   {value}" for at, value in enumerate(values))


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
        "peak": plan.peak,
        "capacity": plan.capacity,
        "fits": plan.fits,
        "flops": dataclasses.asdict(plan.work),
        "roofline": dataclasses.asdict(plan.roofline),
        "traffic": {kind: dataclasses.asdict(found) for kind, found in plan.traffic.items()},
        "compile_seconds": compiled and compiled.seconds,
        "compile_core_seconds": compiled and compiled.core_seconds,
    }
