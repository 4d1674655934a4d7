"""One HTML page of an evaluation that asks nothing of the network: tables, scatter, pictures, router maps, cost."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from lorweb_jax.evaluation import svg
from lorweb_jax.evaluation.results import (
    ALL,
    COST_HEAD,
    Evaluated,
    cell,
    conditions_line,
    cost_rows,
    counts_line,
    difference_rows,
    heading,
    judged_choices,
    judged_scores,
    notes,
)
from lorweb_jax.evaluation.routing_report import routers
from lorweb_jax.evaluation.samples import Sample
from lorweb_jax.evaluation.table import TRUTH
from lorweb_jax.images.grid import within

SHOWN = 160  # px of an embedded picture's longer edge
# What ranks pictures, and what counts as accuracy in the scatter: the first that there is.
RANKS = ("lpips", "mse", "clip_directional", "alexnet_directional")
ACCURACY = ("clip_directional", "alexnet_directional", "lpips")
PRESERVATION = "lpips_b"

_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1b1f24;--soft:#5b6570;--line:#d5dae0;--panel:#f5f7f9;--ink:#1f5fbf}
@media (prefers-color-scheme:dark){:root{--back:#14171a;--text:#e6e9ec;--soft:#9aa5b0;--line:#363d45;--panel:#1d2226;
--ink:#7fb0ff}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:90rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.25rem;margin:2rem 0 .4rem;border-top:1px solid var(--line);
padding-top:1rem}h3{font-size:1.05rem;margin:1.2rem 0 .3rem}p,li{overflow-wrap:anywhere}
.soft,figcaption{color:var(--soft)}
.scroll{overflow-x:auto;margin:.5rem 0}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--back);white-space:normal;
min-width:7rem;max-width:14rem;overflow-wrap:anywhere}
td small{display:block;color:var(--soft);font-weight:400}.best{font-weight:700}
.row{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.6rem;margin:.6rem 0;
overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(5.5rem,1fr));gap:.5rem;margin-top:.4rem}
figure{margin:0}
figure img{display:block;width:100%;height:auto;max-width:10rem;image-rendering:pixelated;border-radius:2px}
figcaption{font-size:.8rem;line-height:1.3;overflow-wrap:anywhere}
.figure{width:100%;max-width:34rem;height:auto;display:block}
.figure text{fill:var(--text);font:11px system-ui,sans-serif}
.grid{stroke:var(--line)}.whisker{stroke:currentColor;stroke-width:1.5}circle{fill:currentColor}
.figure .number{fill:var(--back);font-weight:700}.cell{fill:var(--ink)}
.m0{color:#1f77d0}.m1{color:#d1495b}.m2{color:#3a8f4d}.m3{color:#b07800}.m4{color:#8a56c2}.m5{color:#00868f}
.m6{color:#b0457f}.m7{color:#6b7480}.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.legend b{display:inline-block;min-width:1.4rem}summary{cursor:pointer;margin:.6rem 0}
"""


def report(
    data: Evaluated, results: Mapping[str, Any], samples: Mapping[str, Sample], title: str = "Evaluation"
) -> str:
    """The page as a text. results: of `figures`. samples: by id, as in `data.triplets`."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p class=soft>{escape(conditions_line(results))}</p>",
    ]
    for split, of in results["splits"].items():
        parts += [
            f"<h2>{escape(split) or 'Results'}</h2><p>{escape(counts_line(of))}</p>",
            _score_table(results, of),
            _scatter(results, of),
            _differences(results, of),
        ]
        if split != ALL or len(results["splits"]) == 1:
            parts.append(_pictures(data, results, samples, data.splits[split]))
    parts += [
        _judge(results.get("judge")),
        *routers(data, _table, picture),
        _cost(results),
        _tasks(results),
        _meaning(data, results),
    ]
    return "\n".join(part for part in parts if part) + "\n</body></html>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """head and the cells are HTML already."""
    top = "".join(f"<th>{x}</th>" for x in head)
    body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _small(text: str) -> str:
    """What stands in brackets or after a comma on a line of its own."""
    head, sign, rest = text.partition(" (")
    return f"{escape(head)}<small>{escape(rest.replace(')', ''))}</small>" if sign else escape(text)


def _html(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of a name and figures as cells of `_table`."""
    return [[escape(name), *map(_small, figures)] for name, *figures in rows]


def _score_table(results: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    scores, rows = results["scores"], []
    best = {}
    for score, about in scores.items():
        # Copying preserves b by doing nothing, and the truth is the truth: neither competes.
        values = {
            name: values[score]["mean"]
            for name, values in of["methods"].items()
            if score in values and name != TRUTH and results["cost"][name]["kind"] != "copy"
        }
        if len(values) > 1:
            best[score] = (min if about["lower"] else max)(values, key=values.__getitem__)
    for name, values in of["methods"].items():
        cells = []
        for score, about in scores.items():
            text = _small(cell(values.get(score), about["digits"]))
            cells.append(f'<span class="best">{text}</span>' if best.get(score) == name else text)
        rows.append([escape(name), *cells])
    head = ["method", *(escape(heading(about)) for about in scores.values())]
    return _table(head, rows)


def _scatter(results: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    """Preservation against accuracy, a mark a method."""
    accuracy = next((name for name in ACCURACY if name in results["scores"]), None)
    if accuracy is None or PRESERVATION not in results["scores"]:
        return ""
    points = [
        svg.Point(
            name,
            values[PRESERVATION]["mean"],
            values[accuracy]["mean"],
            values[PRESERVATION]["interval_95"],
            values[accuracy]["interval_95"],
        )
        for name, values in of["methods"].items()
        if PRESERVATION in values and accuracy in values
    ]
    if not points:
        return ""
    x, y = (results["scores"][name] for name in (PRESERVATION, accuracy))
    drawn = svg.scatter(
        points,
        f"{x['label']}, less is better preserved",
        f"{y['label']}, {'less' if y['lower'] else 'more'} is more accurate",
    )
    legend = "".join(f'<li class="m{i % 8}"><b>{i + 1}</b>{escape(p.label)}</li>' for i, p in enumerate(points))
    return f'<h3>Preservation and accuracy</h3>{drawn}<ul class="legend">{legend}</ul>'


def _differences(results: Mapping[str, Any], of: Mapping[str, Any]) -> str:
    rows = difference_rows(results, of)
    if not rows:
        return ""
    head = ["first − second", *(escape(about["label"]) for about in results["scores"].values())]
    body = _html([[title, *cells.values()] for title, cells in rows])
    return (
        "<h3>Differences by task</h3><p class=soft>Mean, its interval, and the share of tasks on which the first is "
        f"better. All pairs stand in results.json.</p>{_table(head, body)}"
    )


def picture(image: np.ndarray) -> str:
    """An img element with the picture in it, WebP or, where it is small, PNG."""
    image = within(image, SHOWN)
    kind, options = ("png", {"optimize": True}) if max(image.shape[:2]) <= 64 else ("webp", {"quality": 80})
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind, **options)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" width="{image.shape[1]}" height="{image.shape[0]}" src="data:image/{kind};base64,{text}">'


def _pictures(data: Evaluated, results: Mapping[str, Any], samples: Mapping[str, Sample], keys: Sequence[str]) -> str:
    """The best, the median and the worst result of each method of the user."""
    own = [name for name in data.compared if data.methods[name].about["kind"] not in ("copy", "base")] or data.compared
    rank = next(
        (
            name
            for name in RANKS
            if all(data.records[of][key]["scores"].get(name) is not None for of in own for key in keys)
        ),
        None,
    )
    if rank is None or not own:
        return ""
    about, parts = results["scores"][rank], []
    for name in own:
        values = {key: data.records[name][key]["scores"][rank] for key in keys}
        ranked = sorted(keys, key=values.__getitem__, reverse=not about["lower"])
        picks = dict(zip(("best", "median", "worst"), (ranked[0], ranked[(len(ranked) - 1) // 2], ranked[-1])))
        for place, key in picks.items():
            parts.append(_picture_row(data, samples[key], key, f"{name}: {place}", rank, about))
    return f"<h3>Best, median and worst by {escape(about['label'])}</h3>{''.join(parts)}"


def _picture_row(data: Evaluated, sample: Sample, key: str, title: str, rank: str, about: Mapping[str, Any]) -> str:
    images: list[tuple[str, np.ndarray]] = [("a", sample.a), ("a′", sample.a2), ("b", sample.b)]
    for name in data.compared:
        if data.methods[name].about["kind"] != "copy":
            record = data.records[name][key]
            value = record["scores"].get(rank)
            shown = "" if value is None else f" {value:.{about['digits']}f}"
            images.append((name + shown, data.methods[name].image(key, record)))
    if sample.b2 is not None:
        images.append((TRUTH, sample.b2))
    figures = "".join(
        f"<figure>{picture(image)}<figcaption>{escape(caption)}</figcaption></figure>" for caption, image in images
    )
    where = f"{sample.task}: “{sample.caption}”" if sample.caption else sample.task
    return (
        f'<div class="row"><b>{escape(title)}</b> <span class=soft>{escape(where)}</span>'
        f'<div class="pictures">{figures}</div></div>'
    )


def _judge(judged: Mapping[str, Any] | None) -> str:
    if not judged:
        return ""
    parts = [f"<h2>Judge</h2><p class=soft>{escape(judged['model'])}</p>"]
    if judged.get("scores"):
        rows = _html(judged_scores(judged))
        parts.append(_table(["method", "accuracy ↑", "consistency ↑", "answered", "unanswered"], rows))
    if judged.get("choices"):
        rows = _html(judged_choices(judged))
        parts.append(_table(["forced choice", "wins (68 %)", "answered", "unanswered"], rows))
    return "".join(parts)


def _cost(results: Mapping[str, Any]) -> str:
    rows = [[escape(x) for x in row] for row in cost_rows(results)]
    return "<h2>Cost</h2>" + _table(COST_HEAD, rows)


def _tasks(results: Mapping[str, Any]) -> str:
    """All tasks with all methods, folded away."""
    scores, rows = results["scores"], []
    for task, of in results["per_task"].items():
        for name, values in of.items():
            if name != "triplets":
                cells = (f"{values[s]:.{about['digits']}f}" if s in values else "–" for s, about in scores.items())
                rows.append([escape(task.lstrip("/")), escape(name), str(of["triplets"]), *cells])
    head = ["task", "method", "triplets", *(escape(about["label"]) for about in scores.values())]
    return f"<details><summary>Every task</summary>{_table(head, rows)}</details>"


def _meaning(data: Evaluated, results: Mapping[str, Any]) -> str:
    lines = [f"{about['label']}: {about['meaning']}." for about in results["scores"].values() if about["meaning"]]
    lines.append(f"Intervals: {results['confidence']:.0%}, bootstrap over tasks.")
    lines += [line.removeprefix("- ") for line in notes(results)]
    parts = ["<h2>What the figures mean</h2><ul>", *(f"<li>{escape(line)}</li>" for line in lines), "</ul>"]
    if skipped := data.setup["skipped"]:
        items = "".join(
            f"<li>{escape(each['task'])}: {escape(each['file'])}: {escape(each['reason'])}</li>" for each in skipped
        )
        parts.append(f"<details><summary>What was skipped ({len(skipped)})</summary><ul>{items}</ul></details>")
    return "".join(parts)
