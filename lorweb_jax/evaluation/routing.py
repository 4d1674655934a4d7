"""What routers chose, in figures: which members each task uses, and how many members a layer uses in effect."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError


class Routing(NamedTuple):
    """weights: {task: [n]}, shares of the members averaged over layers and a task's analogies, each summing to 1.
    effective: {path: (of one analogy, of all analogies together)}, effective numbers of members (1 to n), the first
    averaged over layers and analogies, the second over layers. dead: members whose share is below a tenth of 1/n in
    every layer."""

    weights: dict[str, np.ndarray]
    effective: dict[str, tuple[float, float]]
    dead: list[int]


def shares(coefficients: np.ndarray) -> np.ndarray:
    """|c| / Σ|c| over the last axis; equal shares where all are 0."""
    size = np.abs(np.asarray(coefficients, np.float64))
    total = size.sum(-1, keepdims=True)
    return np.where(total > 0, size / np.where(total > 0, total, 1), 1 / size.shape[-1])


def effective_members(share: np.ndarray) -> np.ndarray:
    """exp(−Σ p ln p) over the last axis: n for equal shares, 1 where one member takes all."""
    return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(-1))


def read_routing(path: str | Path, tasks: Mapping[str, str]) -> Routing:
    """From a coefficients.npz. tasks: {sample's id: its task}. UserError for a file that is damaged."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        names: Sequence[str] = [tasks[key] for key in arrays.pop("ids").tolist()]
    except Exception as error:  # a damaged zip raises nearly every kind of error
        raise UserError(f"{path} can't be read ({error}); delete it, and the same command makes it again") from None
    by_path = {name: shares(c) for name, c in arrays.items()}  # [b, l, n]
    everywhere = np.concatenate(list(by_path.values()), 1)
    of_analogy = everywhere.mean(1)
    weights = {
        task: of_analogy[[i for i, name in enumerate(names) if name == task]].mean(0) for task in dict.fromkeys(names)
    }
    effective = {
        name: (float(effective_members(c).mean()), float(effective_members(c.mean(0)).mean()))
        for name, c in by_path.items()
    }
    members = everywhere.shape[-1]
    dead = np.flatnonzero((everywhere.mean(0) < 0.1 / members).all(0)).tolist()
    return Routing(weights, effective, dead)
