"""The benchmark's result for a person to read."""

from typing import Any

from lorweb_jax.benchmark.run import OVERHEADS, ROWS, TORCH_ROWS


def table(result: dict[str, Any]) -> str:
    setting, machine, ceiling = (result[name] for name in ("setting", "machine", "ceilings"))
    memory = "peak RSS" if machine["platform"] == "cpu" else "peak mem."
    lines = [
        f"{setting['size']} {setting['what']}, {setting['dtype']}: batch {setting['batch']}, {setting['tokens']} "
        f"noisy and conditioning + {setting['text_tokens']} text tokens, basis of {setting['basis_size']} x rank "
        f"{setting['basis_rank']}" + (f", remat {setting['remat']}" if setting["what"] == "train" else ""),
        f"on {machine['device']}, {machine['threads']} of {machine['cores']} cores, jax {machine['jax']}, "
        f"Python {machine['python']}, attention {setting['attention']}" + _attention(result["attention_seconds"]),
        f"ceilings: matmul {ceiling['matmul'] / 1e12:.4g} TFLOP/s ({setting['dtype']} {ceiling['matmul_shape']}), "
        f"copy {ceiling['copy'] / 1e9:.4g} GB/s",
        f"{setting['repeats']} repeats, " + ("the rows taking turns" if result["interleaved"] else
                                             "one row after the other (together they would not fit in memory)"),
        "",
        f"{'':36}{'ms a step':>11}{'min - max':>20}{'TFLOP/s':>10}{'of matmul':>11}{memory:>11}{'compile':>9}",
    ]
    for row in result["rows"]:
        if "skipped" in row:
            lines.append(f"{row['name']:36}skipped: {row['skipped']}")
            continue
        low, high = (f"{1e3 * bound(row['seconds']):.4g}" for bound in (min, max))
        compiling = f"{row['compile_seconds']:.1f} s" if row["compile_seconds"] else ""
        lines.append(f"{row['name']:36}{1e3 * row['median_seconds']:>11.4g}{f'{low} - {high}':>20}"
                     f"{row['flops_per_second'] / 1e12:>10.4g}{row['share_of_ceiling']:>11.1%}"
                     f"{row['peak_bytes'] / 1e9:>8.2f} GB{compiling:>9}")
    notes = [f"{row['name']}: {row['note']}" for row in result["rows"] if row.get("note")]
    return "\n".join([*lines, "", *_ratios(result), *notes])


def _attention(seconds: dict[str, Any]) -> str:
    if not seconds:
        return ""
    shown = [f"{name} {1e3 * value:.3g} ms" if isinstance(value, float) else f"{name}: {value}"
             for name, value in seconds.items()]
    return f" (measured: {', '.join(shown)})"


def _ratios(result: dict[str, Any]) -> list[str]:
    what, found = result["setting"]["what"], result["ratios"]
    names = ROWS[what] | TORCH_ROWS[what]
    ours = next(iter(ROWS[what]))
    lines = [f"{names[row]}: {found[f'{row}/{other}'] - 1:+.1%} of the time of {names[other]}"
             for row, other in OVERHEADS[what] if f"{row}/{other}" in found]
    return lines + [f"{names[ours]} takes {found[f'{ours}/{row}']:.3f} of the time of {names[row]}"
                    for row in TORCH_ROWS[what] if f"{ours}/{row}" in found]
