"""What routers chose, in figures: which members each task and each layer uses, and where analogies lie among others."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError

DEAD = 0.1  # of an equal share: a member with less is of no use to a layer


class Layer(NamedTuple):
    """How one layer uses its n members. usage: mean share of each, [n].

    effective: numbers of members in effect, 1 to n: of one analogy, of one task's analogies together and of all
    together; the first two averaged. dead: how many members have less than a tenth of an equal share.
    """

    path: str
    block: int
    usage: np.ndarray
    effective: tuple[float, float, float]
    dead: int


class Routing(NamedTuple):
    """weights: {task: [n]}, shares of the members averaged over layers and a task's analogies, each summing to 1.
    layers: of every path and block. dead: members of no use to any layer.
    place: analogies [b, 2] on a map that keeps distances between their coefficients as well as a plane can; explained:
    what part of their variance it keeps. tasks: of the analogies. distances: between tasks [tasks, tasks], in the order
    of `weights`, of their mean coefficients, as root mean square over layers."""

    weights: dict[str, np.ndarray]
    layers: list[Layer]
    dead: list[int]
    place: np.ndarray
    explained: float
    tasks: list[str]
    distances: np.ndarray

    @property
    def members(self) -> int:
        return len(self.layers[0].usage)

    def effective(self, path: str | None = None) -> tuple[float, float, float]:
        """`Layer.effective` averaged over the layers of a path, or over all."""
        chosen = [layer.effective for layer in self.layers if path in (None, layer.path)]
        one, task, together = np.mean(chosen, axis=0).tolist()
        return one, task, together

    def unused(self, path: str | None = None) -> float:
        """`Layer.dead` averaged likewise."""
        return float(np.mean([layer.dead for layer in self.layers if path in (None, layer.path)]))


def shares(coefficients: np.ndarray) -> np.ndarray:
    """|c| / Σ|c| over the last axis; equal shares where all are 0."""
    size = np.abs(np.asarray(coefficients, np.float64))
    total = size.sum(-1, keepdims=True)
    return np.where(total > 0, size / np.where(total > 0, total, 1), 1 / size.shape[-1])


def entropy(share: np.ndarray) -> np.ndarray:
    """−Σ p ln p over the last axis, in nats: 0 to ln n."""
    return -(share * np.log(np.where(share > 0, share, 1))).sum(-1)


def effective_members(share: np.ndarray) -> np.ndarray:
    """exp of the entropy over the last axis: n for equal shares, 1 where one member takes all."""
    return np.exp(entropy(share))


def routing_of(coefficients: Mapping[str, np.ndarray], tasks: Sequence[str]) -> Routing:
    """From {path: c [b, l, n]} of analogies, and the task of each."""
    members_of = {task: [i for i, name in enumerate(tasks) if name == task] for task in dict.fromkeys(tasks)}
    layers = []
    by_path = {path: shares(c) for path, c in coefficients.items()}
    for path, share in by_path.items():
        by_task = np.stack([share[rows].mean(0) for rows in members_of.values()])  # [tasks, l, n]
        together = share.mean(0)
        figures = effective_members(share).mean(0), effective_members(by_task).mean(0), effective_members(together)
        for block, usage in enumerate(together):
            one, task, everything = (float(of[block]) for of in figures)
            dead = int((usage < DEAD / len(usage)).sum())
            layers.append(Layer(path, block, usage, (one, task, everything), dead))
    of_analogy = np.concatenate(list(by_path.values()), 1).mean(1)
    weights = {task: of_analogy[rows].mean(0) for task, rows in members_of.items()}
    never = np.stack([layer.usage for layer in layers]) < DEAD / layers[0].usage.size
    points = np.concatenate([np.asarray(c, np.float64).reshape(len(tasks), -1) for c in coefficients.values()], 1)
    points /= np.sqrt(len(layers))  # distances are then root mean squares over layers
    place, explained = on_a_plane(points)
    means = np.stack([points[rows].mean(0) for rows in members_of.values()])
    return Routing(
        weights, layers, np.flatnonzero(never.all(0)).tolist(), place, explained, list(tasks), pairwise(means)
    )


def on_a_plane(points: np.ndarray) -> tuple[np.ndarray, float]:
    """(coordinates [b, 2], part of the variance that they keep) of points [b, d] by principal components, which is
    classical multidimensional scaling of their Euclidean distances. Each axis has the sign that makes its largest
    coordinate positive."""
    centred = points - points.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    place = np.zeros((len(points), 2))
    place[:, : min(2, len(s))] = (u * s)[:, :2]
    place *= np.sign(place[np.abs(place).argmax(0), [0, 1]] + 1e-300)
    total = float((s**2).sum())
    return place, float((s[:2] ** 2).sum() / total) if total > 0 else 1.0


def pairwise(points: np.ndarray) -> np.ndarray:
    """Euclidean distances [n, n] between points [n, d]."""
    squares = (points**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, ties at their mean rank; 0 where one of them doesn't vary."""
    one, other = (_ranks(np.asarray(values, np.float64)) for values in (x, y))
    if one.std() == 0 or other.std() == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def edit_distances(directions: np.ndarray, tasks: Sequence[str], order: Sequence[str]) -> np.ndarray:
    """Between the tasks in `order`: 1 − the cosine of their mean E(a′) − E(a), directions [b, p] of analogies whose
    tasks are given."""
    means = np.stack([directions[[i for i, name in enumerate(tasks) if name == task]].mean(0) for task in order])
    lengths = np.linalg.norm(means, axis=1, keepdims=True)
    unit = means / np.where(lengths > 0, lengths, 1)
    return 1 - unit @ unit.T


def read_coefficients(path: str | Path, tasks: Mapping[str, str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """({name: [b, …]}, sample ids [b]) of a coefficients.npz, whose arrays are c [b, l, n] by path, or of an edits.npz.
    UserError for a file that is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        ids = arrays.pop("ids").tolist()
        if not arrays or any(key not in tasks for key in ids):
            raise ValueError("it is of other analogies")
        return arrays, ids
    except Exception as error:  # a damaged zip raises nearly every kind of error
        raise UserError(f"{path} can't be read ({error}); delete it, and the same command makes it again") from None


def read_routing(path: str | Path, tasks: Mapping[str, str]) -> Routing:
    """From a coefficients.npz. tasks: {sample's id: its task}."""
    coefficients, ids = read_coefficients(path, tasks)
    return routing_of(coefficients, [tasks[key] for key in ids])
