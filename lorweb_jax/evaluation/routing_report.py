"""What a report shows of a method's router: maps of members, tables by layer, analogies on a plane."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lorweb_jax.evaluation.making import BLENDS, COEFFICIENTS, EDITS, PATH
from lorweb_jax.evaluation.results import Evaluated
from lorweb_jax.evaluation.routing import Routing, edit_distances, rank_correlation, read_coefficients, read_routing
from lorweb_jax.images import svg
from lorweb_jax.images.io import read_image

MOST_TASKS = 60  # rows of a router map


def routers(data: Evaluated, table, picture) -> list[str]:
    """Sections of all methods that have a router. table, picture: the report's own, which give HTML."""
    tasks = {key: about["task"] for key, about in data.triplets.items()}
    parts = []
    for name, method in data.methods.items():
        if (method.folder / COEFFICIENTS).exists():
            routing = read_routing(method.folder / COEFFICIENTS, tasks)
            parts += [
                f"<h2>Router of {escape(name)}</h2>",
                *_members(routing, table),
                *_map(routing),
                *_distances(routing, method.folder.parent.parent / EDITS, tasks),
            ]
            if (path := method.folder / PATH).is_file():
                parts.append(_strip(read_image(path), picture))
    return parts


def _members(routing: Routing, table) -> list[str]:
    shown, step = _some(list(routing.weights))
    rows = [
        [escape(path), *(f"{x:.1f}" for x in routing.effective(path)), f"{routing.unused(path):.1f}"]
        for path in dict.fromkeys(layer.path for layer in routing.layers)
    ]
    rows.append(["<b>all layers</b>", *(f"<b>{x:.1f}</b>" for x in routing.effective()), f"{routing.unused():.1f}"])
    by_layer = [
        [f"{escape(layer.path)} {layer.block}", *(f"{x:.1f}" for x in layer.effective), str(layer.dead)]
        for layer in routing.layers
    ]
    head = ["layers", "of one analogy", "of one task", "of all together", "unused members a layer"]
    names = [f"{layer.path.split('.')[-1]} {layer.block}" for layer in routing.layers]
    usage = np.stack([layer.usage for layer in routing.layers])
    every = f"; every {step}th task" if step > 1 else ""
    dead = ", ".join(map(str, routing.dead)) or "none"
    return [
        f"<p>Share of each member by task, averaged over all layers{every}. Members that no layer uses: {dead}.</p>",
        svg.heat_map(np.stack([routing.weights[task] for task in shown]), shown),
        f"<h3>Effective number of members, of {routing.members}</h3>",
        table(head, rows),
        "<details><summary>Every layer</summary>",
        table(["layer", *head[1:4], "unused"], by_layer),
        f"<p>Share of each member, averaged over all analogies:</p>{svg.heat_map(usage, names)}</details>",
    ]


def _some(tasks: Sequence[str]) -> tuple[Sequence[str], int]:
    step = -(-len(tasks) // MOST_TASKS)
    return tasks[::step], step


def _map(routing: Routing) -> list[str]:
    """Analogies on a plane, coloured by task."""
    if len(routing.place) < 3:
        return []
    names = list(routing.weights)
    colours = dict(zip(names, svg.hues(len(names))))
    return [
        f"<h3>Analogies by their coefficients</h3><p class=soft>The plane keeps {routing.explained:.0%} of the "
        "variance; one colour a task, named when pointed at.</p>",
        svg.dots(
            routing.place.tolist(),
            "first component",
            "second",
            routing.tasks,
            [colours[task] for task in routing.tasks],
            least_height=0.7,
        ),
    ]


def _distances(routing: Routing, path: Path, tasks: Mapping[str, str]) -> list[str]:
    """Distance of coefficients against distance of edits, a dot for two tasks."""
    names = list(routing.weights)
    if len(names) < 3 or not path.is_file():
        return []
    arrays, ids = read_coefficients(path, tasks)
    edits = edit_distances(arrays["directions"], [tasks[key] for key in ids], names)
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    x, y = ([matrix[pair] for pair in pairs] for matrix in (edits, routing.distances))
    return [
        "<h3>Do tasks that edit alike have coefficients alike?</h3><p class=soft>A dot for two tasks. Edits differ by "
        "1 − the cosine of their mean E(a′) − E(a), E by AlexNet; coefficients by the root mean square over layers. "
        f"Spearman's rank correlation: {rank_correlation(x, y):.2f}.</p>",
        svg.dots(
            list(zip(x, y)),
            "distance of edits",
            "distance of coefficients",
            [f"{names[i]}, {names[j]}" for i, j in pairs],
        ),
    ]


def _strip(image: np.ndarray, picture) -> str:
    """b, then b′ by the mixes from one analogy's coefficients to another's."""
    images = np.split(image, BLENDS + 1, 1)
    captions = ["b", *(f"{t:.2g}" for t in np.linspace(0, 1, BLENDS))]
    figures = "".join(
        f"<figure>{picture(each)}<figcaption>{caption}</figcaption></figure>" for each, caption in zip(images, captions)
    )
    return (
        "<h3>From one analogy's coefficients to another's</h3><p class=soft>The same b, pair and noise throughout; the "
        f"mix goes from its own (0) to that of the analogy farthest from it (1).</p><div class=pictures>{figures}</div>"
    )
