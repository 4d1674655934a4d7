"""The benchmark's result for a person to read."""

from statistics import median
from typing import Any


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    cells = [["", *_titles(result)], *(_cells(row, result) for row in rows if "skipped" not in row)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = max(len(row["name"]) for row in rows)

    def line(*cells: str) -> str:
        return "  ".join(
            cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(zip(cells, widths))
        ).rstrip()

    body = [
        line(row["name"], f"skipped: {row['skipped']}") if "skipped" in row else line(*_cells(row, result))
        for row in rows
    ]
    notes = [f"{row['name']}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([*_header(result), "", line(*cells[0]), *body, "", *_ratios(result), *notes])


def _titles(result: dict[str, Any]) -> list[str]:
    on_cpu, per_sample = _kinds(result)
    return [
        "ms a step",
        "min - max",
        *["ms a sample"] * per_sample,
        *["CPU ms"] * on_cpu,
        "TFLOP/s",
        "of matmul",
        "peak RSS" if on_cpu else "peak mem.",
        "weights",
        "tempor.",
        "compile",
    ]


def _cells(row: dict[str, Any], result: dict[str, Any]) -> list[str]:
    on_cpu, per_sample = _kinds(result)
    milliseconds = 1e3 * row["median_seconds"]
    return [
        row["name"],
        _number(milliseconds),
        " - ".join(_number(1e3 * bound(row["seconds"])) for bound in (min, max)),
        *[_number(milliseconds / result["setting"]["batch"])] * per_sample,
        *[_number(1e3 * median(row["cpu_seconds"]))] * on_cpu,
        _number(row["flops_per_second"] / 1e12),
        f"{row['share_of_ceiling']:.1%}",
        *[_size(row[name]) for name in ("peak_bytes", "weight_bytes", "temporary_bytes")],
        f"{row['compile_seconds']:.1f} s" if row["compile_seconds"] else "",
    ]


def _kinds(result: dict[str, Any]) -> tuple[bool, bool]:
    """Whether it ran on a CPU, and whether a step is of several samples."""
    return result["machine"]["platform"] == "cpu", result["setting"]["batch"] > 1


def _number(value: float) -> str:
    """Four digits, or all before the point."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _header(result: dict[str, Any]) -> list[str]:
    setting, machine, ceiling = (result[name] for name in ("setting", "machine", "ceilings"))
    training = setting["what"] == "train"
    told = [
        f"{text} {setting[field]}"
        for field, text in (("quantization", "frozen weights quantised:"), ("remat", "remat"), ("moments", "moments"))
        if field not in result["varied"] and (training or field == "quantization") and setting[field] != "none"
    ]
    eight_bit = "".join(
        f", {kind} {ceiling[kind] / 1e12:.4g} T{'FL' if kind == 'fp8' else ''}OP/s"
        for kind in ("int8", "fp8")
        if kind in ceiling
    )
    return [
        f"{setting['size']} {setting['what']}, {setting['dtype']}: batch {setting['batch']}, {setting['tokens']} "
        f"noisy and conditioning + {setting['text_tokens']} text tokens, basis of {setting['basis_size']} x rank "
        f"{setting['basis_rank']}" + "".join(f", {text}" for text in told),
        f"on {machine['device']}, {machine['threads']} of {machine['cores']} cores, jax {machine['jax']}, "
        f"Python {machine['python']}, attention {setting['attention']}" + _attention(result["attention_seconds"]),
        f"ceilings: matmul {ceiling['matmul'] / 1e12:.4g} TFLOP/s ({setting['dtype']} {ceiling['matmul_shape']})"
        f"{eight_bit}, copy {ceiling['copy'] / 1e9:.4g} GB/s",
        f"{setting['repeats']} repeats, "
        + (
            "the rows taking turns"
            if result["interleaved"]
            else "one row after the other (together they would not fit in memory)"
        ),
    ]


def _attention(seconds: dict[str, float]) -> str:
    if not seconds:
        return ""
    return f" (measured: {', '.join(f'{name} {1e3 * value:.3g} ms' for name, value in seconds.items())})"


def _size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _ratios(result: dict[str, Any]) -> list[str]:
    names = {row["row"]: row["name"] for row in result["rows"]}
    return [
        f"{names[found['row']]} takes {found['ratio']:.3f} of the time of {names[found['other']]}"
        if found["torch"]
        else f"{names[found['row']]}: {found['ratio'] - 1:+.1%} of the time of {names[found['other']]}"
        for found in result["ratios"]
    ]
