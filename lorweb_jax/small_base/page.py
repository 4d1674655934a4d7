"""The page of lorweb_jax.base_report: tables in Markdown, figures in JSON, sheets in WebP."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from lorweb_jax.data.embedded.bulk import operated_chunk
from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, STYLE_WORDS, DrawingSets, with_article
from lorweb_jax.data.embedded.operations import OPERATIONS
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.images.io import write_file, write_image
from lorweb_jax.images.pictures import sheet
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.small_base import evaluation as base

NAMES = ("red apple", "cat", "rocket", "house with garden", "grinning face", "sunflower", "robot", "sailboat")
SIDE, QUALITY = 64, 40  # least size of a picture in the sheets, px, and their quality: many are shown


def write_page(
    pipeline: Pipeline,
    drawings: DrawingSets,
    out: Path,
    *,
    per_cell: int,
    samples: int,
    steps: int,
    cfg: float,
    seed: int,
    command: str,
) -> dict:
    """Measure everything; returns what figures.json holds."""
    results = base.measure_edits(pipeline, base.choose_edits(drawings, per_cell, seed), steps=steps, seed=seed)
    figures = {"edits": edit_figures(results)}
    write_image(out / "edits.webp", edit_sheet(results), quality=QUALITY)
    figures["text_to_image"] = _text_to_image(pipeline, drawings, out, samples, steps, cfg, seed)
    figures["reconstruction"] = _reconstruction(pipeline, drawings, out, per_cell)
    write_json(out / "figures.json", figures)
    write_file(out / "report.md", page(figures, command, per_cell, steps, cfg).encode())
    return figures


def edit_figures(results: Sequence[base.Result]) -> dict:
    """{measure: {family: {set: share nearer than copying, "drawings": of all sets of drawings}}} and counts."""
    figures: dict = {"pictures": len(results)}
    for measure in ("lpips", "mse"):
        table: dict = {}
        for family in dict.fromkeys(result.edit.family for result in results):
            of_family = [result for result in results if result.edit.family == family]
            row = {"drawings": [result for result in of_family if result.edit.set_of != PHOTOGRAPH]} | {
                name: [result for result in of_family if result.edit.set_of == of] for of, name in enumerate(SETS)
            }
            table[family] = {name: round(base.share_nearer(part, measure), 3) for name, part in row.items() if part}
        figures[measure] = table
    shares = [row["drawings"] for row in figures["lpips"].values() if "drawings" in row]
    figures["families"] = len(shares)
    figures["families_at_least_60_percent"] = sum(share >= 0.6 for share in shares)
    figures["families_at_least_85_percent"] = sum(share >= 0.85 for share in shares)
    return figures


def edit_sheet(results: Sequence[base.Result]) -> np.ndarray:
    """Of each family the first pictures of three sets: b, what was made, the truth; three to a row."""
    rows = []
    for family in dict.fromkeys(result.edit.family for result in results):
        of_family = [result for result in results if result.edit.family == family]
        sets = list(dict.fromkeys(result.edit.set_of for result in of_family))[:5:2]
        first = [next(result for result in of_family if result.edit.set_of == of) for of in sets]
        rows.append(
            (
                " · ".join(result.edit.prompt.removesuffix(" in the last picture") for result in first),
                [image for result in first for image in (result.edit.b, result.image, result.edit.truth)],
            )
        )
    return sheet(rows, ("b", "edited", "truth") * 3, SIDE)


def _text_to_image(pipeline, drawings, out, samples, steps, cfg, seed) -> dict:
    side = drawings.images.shape[1]
    prototypes = base.kind_prototypes(pipeline, drawings)
    captions, kinds = base.kind_captions(samples)
    images = base.draw(pipeline, captions, side, steps=steps, cfg=cfg, seed=seed)
    right = base.nearest_kinds(pipeline, images, prototypes) == kinds
    by_style = np.resize(np.repeat(np.arange(len(STYLE_WORDS)), samples), len(kinds))
    per_kind = len(STYLE_WORDS) * samples
    write_image(
        out / "kinds.webp",
        sheet(
            [
                (f"a drawing of {with_article(kind)} in … style", images[k * per_kind : (k + 1) * per_kind : samples])
                for k, kind in enumerate(base.KINDS)
            ],
            list(STYLE_WORDS.values()),
            SIDE,
        ),
        quality=QUALITY,
    )

    names = [name for name in NAMES if name in drawings.names]
    titles = [f"a drawing of {with_article(name)} in {word} style" for name in names for word in STYLE_WORDS.values()]
    columns, count = list(STYLE_WORDS.values()), len(STYLE_WORDS)
    for file, size in (("names.webp", side), ("names_large.webp", 2 * side)):
        images = base.draw(pipeline, titles, size, steps=steps, cfg=cfg, seed=seed + 1)
        held_out = {name for name, out_ in zip(drawings.names, drawings.held_out) if out_}
        write_image(
            out / file,
            sheet(
                [
                    (f"{name} (never shown)" if name in held_out else name, images[i * count : (i + 1) * count])
                    for i, name in enumerate(names)
                ],
                columns,
                SIDE,
            ),
            quality=QUALITY,
        )
    return {
        "samples": len(captions),
        "cfg": cfg,
        "kinds": len(base.KINDS),
        "right": _share(right),
        "right_of_real_held_out_drawings": round(base.real_drawings_right(pipeline, drawings, prototypes), 3),
        "right_by_kind": {kind: _share(right[kinds == k]) for k, kind in enumerate(base.KINDS)},
        "right_by_style": {word: _share(right[by_style == s]) for s, word in enumerate(STYLE_WORDS.values())},
    }


def _reconstruction(pipeline, drawings, out, most: int) -> dict:
    """PSNR in dB, plain and after operations, of up to `most` single held-out drawings of each set."""
    figures, rows, random = {}, [], np.random.default_rng(0)
    names = ["", *random.choice(list(OPERATIONS), 12, replace=False)]
    for of, name in enumerate(SETS):
        there = np.flatnonzero(drawings.held_out & (drawings.set_of == of))
        if not len(there):
            continue
        chosen = random.choice(there, min(most, len(there)), replace=False)
        images = operated_chunk(drawings.images[chosen], names)
        plain, edited = images[:, 0], images[:, 1:].reshape(-1, *images.shape[2:])
        result = base.reconstructed(pipeline, plain)
        figures[name] = {
            "plain": round(base.psnr(result, plain), 2),
            "after_operations": round(base.psnr(base.reconstructed(pipeline, edited), edited), 2),
        }
        rows += [(f"{name}, reconstructed below", list(plain[:8])), ("", list(result[:8]))]
    drawn = [value for name, value in figures.items() if name != "photograph"]
    figures["mean_of_drawings"] = {
        key: round(float(np.mean([value[key] for value in drawn])), 2) for key in ("plain", "after_operations")
    }
    write_image(out / "reconstruction.webp", sheet(rows, smallest=SIDE), quality=QUALITY)
    return figures


def _share(x) -> float:
    return round(float(np.mean(x)), 3)


def page(figures: dict, command: str, per_cell: int, steps: int, cfg: float) -> str:
    edits, text, autoencoder = figures["edits"], figures["text_to_image"], figures["reconstruction"]
    columns = ["drawings", *SETS]
    lines = [
        "# What the small base can do",
        "",
        f"Made by `{command}`. No drawing and no photograph that is edited, compared or reconstructed here was shown "
        "in training: the same signs are held out in every set, and three photographs as a whole. Figures: "
        "figures.json.",
        "",
        "## Edits by instruction",
        "",
        "A canvas of four drawings, of which the last is to change as told in words that name the parameter; no "
        f"example pair. The share of {edits['pictures']} pictures (up to {per_cell} of each family and set, {steps} "
        "steps) on which the result is nearer to the truth than the drawing unchanged, by LPIPS (and MSE).",
        "",
        f"{edits['families_at_least_60_percent']} of {edits['families']} families are nearer on at least 60 % of the "
        f"drawings, {edits['families_at_least_85_percent']} on at least 85 %, by LPIPS.",
        "",
        _table("family", columns, edits["lpips"], lambda family, column: _both(edits, family, column)),
        "",
        "![edits](edits.webp)",
        "",
        "## Text to image",
        "",
        f"{text['samples']} pictures of {text['kinds']} kinds in five styles, guidance {cfg:g} against an empty "
        "caption. Our CLIP vision, which compares them with training drawings of each kind, takes "
        f"{text['right']:.1%} of them for what they were to be; of real held-out drawings "
        f"{text['right_of_real_held_out_drawings']:.1%}.",
        "",
        "By kind: " + ", ".join(f"{kind} {share:.0%}" for kind, share in text["right_by_kind"].items()) + ".",
        "",
        "By style: " + ", ".join(f"{word} {share:.0%}" for word, share in text["right_by_style"].items()) + ".",
        "",
        "![kinds](kinds.webp)",
        "",
        "By name, at a drawing's size and at the canvas's:",
        "",
        "![names](names.webp) ![names, large](names_large.webp)",
        "",
        "## Reconstruction",
        "",
        "Peak signal-to-noise ratio of the autoencoder, dB.",
        "",
        _table("set", ["plain", "after_operations"], autoencoder, lambda name, key: f"{autoencoder[name][key]:.1f}"),
        "",
        "![reconstruction](reconstruction.webp)",
        "",
    ]
    return "\n".join(lines)


def _both(edits: dict, family: str, column: str) -> str:
    if column not in edits["lpips"][family]:
        return "–"
    return f"{edits['lpips'][family][column]:.0%} ({edits['mse'][family][column]:.0%})"


def _table(corner: str, columns: Sequence[str], rows: dict, cell: Callable[[str, str], str]) -> str:
    return tabulate(
        [[row.replace("_", " "), *(cell(row, column) for column in columns)] for row in rows],
        headers=[corner, *(column.replace("_", " ") for column in columns)],
        tablefmt="pipe",
        disable_numparse=True,
    )
