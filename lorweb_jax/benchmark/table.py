"""The benchmark's result for a person to read."""

from statistics import median
from typing import Any


def table(result: dict[str, Any]) -> str:
    setting, rows = result["setting"], result["rows"]
    on_cpu, per_sample = result["machine"]["platform"] == "cpu", setting["batch"] > 1
    width = max(len(row["name"]) for row in rows) + 2
    lines = [*_header(result), "",
             f"{'':{width}}{'ms a step':>11}{'min - max':>18}" + f"{'ms a sample':>13}" * per_sample
             + f"{'CPU ms':>8}" * on_cpu
             + "".join(f"{title:>{wide}}" for title, wide in (
                 ("TFLOP/s", 9), ("of matmul", 11), ("peak RSS" if on_cpu else "peak mem.", 10), ("weights", 10),
                 ("tempor.", 10), ("compile", 9)))]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['name']:{width}}skipped: {row['skipped']}")
            continue
        low, high = (f"{1e3 * bound(row['seconds']):.4g}" for bound in (min, max))
        milliseconds = 1e3 * row["median_seconds"]
        lines.append(f"{row['name']:{width}}{milliseconds:>11.4g}{f'{low} - {high}':>18}"
                     + f"{milliseconds / setting['batch']:>13.4g}" * per_sample
                     + f"{1e3 * median(row['cpu_seconds']):>8.4g}" * on_cpu
                     + f"{row['flops_per_second'] / 1e12:>9.4g}{row['share_of_ceiling']:>11.1%}"
                     + "".join(f"{_size(row[name]):>10}" for name in ("peak_bytes", "weight_bytes", "temporary_bytes"))
                     + (f"{row['compile_seconds']:>7.1f} s" if row["compile_seconds"] else ""))
    notes = [f"{row['name']}: {row['note']}" for row in rows if row.get("note")]
    return "\n".join([*lines, "", *_ratios(result), *notes])


def _header(result: dict[str, Any]) -> list[str]:
    setting, machine, ceiling = (result[name] for name in ("setting", "machine", "ceilings"))
    training = setting["what"] == "train"
    told = [f"{text} {setting[field]}" for field, text in
            (("quantization", "frozen weights quantised:"), ("remat", "remat"), ("moments", "moments"))
            if field not in result["varied"] and (training or field == "quantization") and setting[field] != "none"]
    eight_bit = "".join(f", {kind} {ceiling[kind] / 1e12:.4g} T{'FL' if kind == 'fp8' else ''}OP/s"
                        for kind in ("int8", "fp8") if kind in ceiling)
    return [
        f"{setting['size']} {setting['what']}, {setting['dtype']}: batch {setting['batch']}, {setting['tokens']} "
        f"noisy and conditioning + {setting['text_tokens']} text tokens, basis of {setting['basis_size']} x rank "
        f"{setting['basis_rank']}" + "".join(f", {text}" for text in told),
        f"on {machine['device']}, {machine['threads']} of {machine['cores']} cores, jax {machine['jax']}, "
        f"Python {machine['python']}, attention {setting['attention']}" + _attention(result["attention_seconds"]),
        f"ceilings: matmul {ceiling['matmul'] / 1e12:.4g} TFLOP/s ({setting['dtype']} {ceiling['matmul_shape']})"
        f"{eight_bit}, copy {ceiling['copy'] / 1e9:.4g} GB/s",
        f"{setting['repeats']} repeats, " + ("the rows taking turns" if result["interleaved"] else
                                             "one row after the other (together they would not fit in memory)")]


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
    return [f"{names[found['row']]} takes {found['ratio']:.3f} of the time of {names[found['other']]}" if found["torch"]
            else f"{names[found['row']]}: {found['ratio'] - 1:+.1%} of the time of {names[found['other']]}"
            for found in result["ratios"]]
