"""One HTML page of an evaluation that asks nothing of the network: tables, scatter, pictures, router maps, cost."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

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
from lorweb_jax.images import svg
from lorweb_jax.images.page import document, picture, table

# What ranks pictures, and what counts as accuracy in the scatter: the first that there is.
RANKS = ("lpips", "mse", "clip_directional", "alexnet_directional")
ACCURACY = ("clip_directional", "alexnet_directional", "lpips")
PRESERVATION = "lpips_b"


def report(
    data: Evaluated, results: Mapping[str, Any], samples: Mapping[str, Sample], title: str = "Evaluation"
) -> str:
    """The page as a text. results: of `figures`. samples: by id, as in `data.triplets`."""
    parts = [f"<p class=soft>{escape(conditions_line(results))}</p>"]
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
        *routers(data, table, picture),
        _cost(results),
        _tasks(results),
        _meaning(data, results),
    ]
    return document(title, parts)


def _small(text: str) -> str:
    """What stands in brackets or after a comma on a line of its own."""
    head, sign, rest = text.partition(" (")
    return f"{escape(head)}<small>{escape(rest.replace(')', ''))}</small>" if sign else escape(text)


def _html(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Rows of a name and figures as cells of `table`."""
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
    return table(head, rows)


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
        f"better. All pairs stand in results.json.</p>{table(head, body)}"
    )


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
        parts.append(table(["method", "accuracy ↑", "consistency ↑", "answered", "unanswered"], rows))
    if judged.get("choices"):
        rows = _html(judged_choices(judged))
        parts.append(table(["forced choice", "wins (68 %)", "answered", "unanswered"], rows))
    return "".join(parts)


def _cost(results: Mapping[str, Any]) -> str:
    rows = [[escape(x) for x in row] for row in cost_rows(results)]
    return "<h2>Cost</h2>" + table(COST_HEAD, rows)


def _tasks(results: Mapping[str, Any]) -> str:
    """All tasks with all methods, folded away."""
    scores, rows = results["scores"], []
    for task, of in results["per_task"].items():
        for name, values in of.items():
            if name != "triplets":
                cells = (f"{values[s]:.{about['digits']}f}" if s in values else "–" for s, about in scores.items())
                rows.append([escape(task.lstrip("/")), escape(name), str(of["triplets"]), *cells])
    head = ["task", "method", "triplets", *(escape(about["label"]) for about in scores.values())]
    return f"<details><summary>Every task</summary>{table(head, rows)}</details>"


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
