"""The two adapters of Pair Customization (method.md §7): which layers they are on, and how they begin.

Content and style are members of one stacked basis whose coefficients are chosen by name. Their A's are rows of one
orthonormal matrix and stay as they are; a block with only one of the two has a free A, which is trained.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.common.errors import UserError

MEMBERS = ("content", "style")


def orthonormal_rows(gaussian: np.ndarray, ranks: Sequence[int]) -> list[np.ndarray]:
    """From a square Gaussian [i, i]: A [r, i] for each of the ranks, consecutive rows of its Q (G = Q R).

    Signs are as LAPACK gives them, so that a recorded Gaussian gives the recorded rows. Raises UserError for ranks that
    need more rows than there are.
    """
    width = gaussian.shape[1]
    require_ranks(ranks, width)
    return _cut(np.linalg.qr(np.asarray(gaussian, np.float32))[0], ranks)


def fresh_rows(rng: np.random.Generator, width: int, ranks: Sequence[int]) -> list[np.ndarray]:
    """A [r, i] for each of the ranks, float32: all rows together are orthonormal. Costs a reduced QR in float64.

    Raises UserError for ranks that need more rows than there are.
    """
    require_ranks(ranks, width)
    columns = np.linalg.qr(rng.standard_normal((width, sum(ranks))))[0]
    return _cut(columns.T.astype(np.float32), ranks)


def free_rows(rng: np.random.Generator, width: int, rank: int) -> np.ndarray:
    """A [r, i] of a block that has one adapter only: N(0, 1/r²), float32; it is trained."""
    return (rng.standard_normal((rank, width)) / rank).astype(np.float32)


def require_ranks(ranks: Sequence[int], width: int) -> None:
    """UserError unless so many orthonormal rows fit into the layer's input."""
    if sum(ranks) > width:
        raise UserError(
            f"the ranks {' and '.join(map(str, ranks))} need {sum(ranks)} orthonormal rows, but a layer's input is "
            f"only {width} wide; choose ranks whose sum is at most {width}",
            2,
        )


def _cut(rows: np.ndarray, ranks: Sequence[int]) -> list[np.ndarray]:
    ends = np.cumsum(ranks)
    return [np.ascontiguousarray(rows[end - rank : end]) for rank, end in zip(ranks, ends)]


# Lists of blocks by name. "early" and "late" are where SplitFlux (arXiv 2511.15258) finds content and style in FLUX.1,
# blocks 20–29 and 30–57 of all. It counts from 1, the 19 double blocks first: its last is the 57th, the 38th single
# block. So they are the single blocks 0–9 and 10–37, counted from 0; of another depth, as large a part.
BLOCKS: dict[str, Callable[[int], range]] = {
    "all": lambda depth: range(depth),
    "none": lambda depth: range(0),
    "even": lambda depth: range(0, depth, 2),
    "odd": lambda depth: range(1, depth, 2),
    "early": lambda depth: range(depth * 10 // 38),
    "late": lambda depth: range(depth * 10 // 38, depth),
}


def parse_blocks(text: str | Sequence[int], depth: int, name: str) -> tuple[int, ...]:
    """Indices of blocks from a key of BLOCKS, or from a list like "0-10,12" or (0, 1, 2).

    Raises UserError, which calls the list `name`, for anything else and for blocks that the model doesn't have.
    """
    if isinstance(text, str) and text in BLOCKS:
        return tuple(BLOCKS[text](depth))
    parts = [str(part).strip() for part in (text.split(",") if isinstance(text, str) else text)]
    if not all(re.fullmatch(r"\d+(-\d+)?", part) for part in parts):
        raise UserError(f"{name} is {text!r}; give one of {', '.join(BLOCKS)}, or indices such as 0-10,12", 2)
    ends = [[int(end) for end in part.split("-")] for part in parts]
    if backward := [part for part, (first, *last) in zip(parts, ends) if last and last[0] < first]:
        raise UserError(f"{name} has the range {backward[0]}, which ends before it begins; turn it round", 2)
    indices = sorted({index for first, *last in ends for index in range(first, (last or [first])[0] + 1)})
    if indices and indices[-1] >= depth:
        raise UserError(
            f"{name} names block {indices[-1]}, but there are {depth}, counted from 0; give smaller indices", 2
        )
    return tuple(indices)


@dataclasses.dataclass(frozen=True)
class Member:
    """One adapter: a {path: [l, r, i]} and b {path: [l, r, o]} of stacks of layers, float32.

    blocks: {path: indices of the blocks that it is on}; elsewhere a and b are zero.
    """

    a: Mapping[str, np.ndarray]
    b: Mapping[str, np.ndarray]
    blocks: Mapping[str, tuple[int, ...]]

    @property
    def rank(self) -> int:
        return next(iter(self.a.values())).shape[1]


def summed(members: Sequence[Member], weights: Sequence[float] | None = None) -> Member:
    """One adapter whose update is the weighted sum of theirs, of the sum of their ranks. weights: by default all 1."""
    ranks = [member.rank for member in members]
    weights = [1.0] * len(members) if weights is None else weights
    a, b, blocks = {}, {}, {}
    for path in dict.fromkeys(path for member in members for path in member.a):
        own = next(member for member in members if path in member.a)
        (depth, _, inputs), outputs = own.a[path].shape, own.b[path].shape[2]
        parts = [
            (member.a[path], np.float32(weight) * member.b[path])
            if path in member.a
            else (np.zeros((depth, rank, inputs), np.float32), np.zeros((depth, rank, outputs), np.float32))
            for member, rank, weight in zip(members, ranks, weights)
        ]
        a[path], b[path] = (np.concatenate(side, axis=1) for side in zip(*parts))
        blocks[path] = tuple(sorted({block for member in members for block in member.blocks.get(path, ())}))
    return Member(a, b, blocks)


def stack(members: Sequence[Member], layers: Mapping[str, AdaptedLayer]) -> dict[str, dict[str, np.ndarray]]:
    """Members as the arrays of one basis, {path: {"a" [l, n, i, r], "b" [l, n, r, o]}}, float32.

    r is the largest rank; lower ranks and absent blocks are padded with zeros. layers: of the model, by path.
    """
    rank, size = max(member.rank for member in members), len(members)
    arrays = {}
    for path in dict.fromkeys(path for member in members for path in member.a):
        layer = layers[path]
        a = np.zeros((layer.depth, size, layer.inputs, rank), np.float32)
        b = np.zeros((layer.depth, size, rank, layer.outputs), np.float32)
        for number, member in enumerate(members):
            if path in member.a:
                a[:, number, :, : member.rank] = member.a[path].transpose(0, 2, 1)
                b[:, number, : member.rank] = member.b[path]
        arrays[path] = {"a": a, "b": b}
    return arrays
