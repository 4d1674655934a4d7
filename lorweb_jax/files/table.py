"""Conversion tables: each row says where one of our parameters lies in a foreign layout.

The same table serves both directions, one parameter (or one block's slice of it) at a time. It is strict: every
parameter has its tensor, every tensor has its parameter, every shape agrees, or nothing is converted.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import Spec
from lorweb_jax.files.state import require_equal
from lorweb_jax.nn.sharding import to_host


class Row(NamedTuple):
    """One of our parameters and its tensor in the foreign layout.

    path: our dotted path. key: their name; "{l}" stands for the block index, the leading axis of ours.
    axes: their tensor transposed by these axes is ours (None: as it is). Where ours has fewer axes than theirs, the
        leading ones have length 1 (a linear layer stored as a 1x1 convolution).
    swapped: the two halves of their leading axis lie the other way round.
    Rows with the same key are the parts of one fused tensor, along its leading axis in the table's order.
    Rows of paths that a model does not have are ignored.
    """

    path: str
    key: str
    axes: tuple[int, ...] | None = None
    swapped: bool = False


LINEAR = (1, 0)  # [o, i] <-> [i, o]
CONV = (2, 3, 1, 0)  # [o, i, kh, kw] <-> [kh, kw, i, o]

Part = tuple[str, int | None]  # our path and the block index, None for a parameter without the leading axis l
Cut = tuple[tuple[int, int], ...]  # (start, stop) of each of our axes


class RowRange(NamedTuple):
    """Rows start..stop along the leading axis of their tensor `key`."""

    key: str
    start: int
    stop: int


class _Location(NamedTuple):
    """Where a part lies: rows start..stop along the leading axis of the tensor `key`, as `row` says."""

    row: Row
    key: str
    start: int
    stop: int


def to_ours(array: np.ndarray, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    """Their part of a tensor -> our parameter (or slice) of `shape`; a view where it can be."""
    array = _unswapped(array, row)
    return (array if row.axes is None else array.transpose(row.axes)).reshape(shape)


def to_theirs(array: np.ndarray, row: Row) -> np.ndarray:
    """Inverse of `to_ours`."""
    if row.axes is not None:
        array = array.reshape((1,) * (len(row.axes) - array.ndim) + array.shape).transpose(np.argsort(row.axes))
    return _unswapped(array, row)


def _unswapped(array: np.ndarray, row: Row) -> np.ndarray:
    return np.concatenate(np.split(array, 2)[::-1]) if row.swapped else array


def _order(row: Row, axes: int) -> tuple[int, ...]:
    """In which order our axes lie in their tensor; axes of length 1 that only they have are left out."""
    if row.axes is None:
        return tuple(range(axes))
    added = len(row.axes) - axes
    return tuple(int(axis) - added for axis in np.argsort(row.axes) if axis >= added)


class Layout:
    """Where each parameter of a model lies in a foreign layout: a table applied to the model's shapes.

    rows: Row or plain tuples. shapes: {our path: anything with .shape}, of the whole model.
    `tensors` is {their key: shape}, complete. Raises UserError if a path of the model has no row.
    """

    def __init__(self, rows: Iterable[Row | tuple], shapes: Mapping[str, Any]):
        self.shapes = {path: tuple(value.shape) for path, value in shapes.items()}
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[Part]] = {}
        self._locations: dict[Part, _Location] = {}
        for row in (row if isinstance(row, Row) else Row(*row) for row in rows):
            if row.path in self.shapes:
                depth = self.shapes[row.path][0] if "{l}" in row.key else None
                for layer in range(depth) if depth is not None else [None]:
                    self._add(row, layer)
        covered = {path for path, _ in self._locations}
        if absent := [path for path in self.shapes if path not in covered]:
            raise UserError(
                f"the conversion table has no row for {absent[0]} ({len(absent)} such); "
                "the model and the table do not belong together"
            )

    def _add(self, row: Row, layer: int | None) -> None:
        key = row.key if layer is None else row.key.replace("{l}", str(layer))
        # A broadcast zero has the shape without the memory.
        shape = to_theirs(np.broadcast_to(np.int8(0), self.part_shape((row.path, layer))), row).shape
        start = self.tensors[key][0] if key in self.tensors else 0
        self._locations[row.path, layer] = _Location(row, key, start, start + shape[0])
        self.tensors[key] = (start + shape[0], *shape[1:])
        self.parts.setdefault(key, []).append((row.path, layer))

    def part_shape(self, part: Part) -> tuple[int, ...]:
        path, layer = part
        return self.shapes[path] if layer is None else self.shapes[path][1:]

    def __iter__(self) -> Iterator[Part]:
        """Parts in the table's order: a stacked parameter's blocks one after another."""
        return iter(self._locations)

    def require(self, checkpoint: Checkpoint, ignored: Collection[str] = ()) -> None:
        """UserError with the differences unless the checkpoint holds just this layout's tensors, in floating point (and
        `ignored`)."""
        shapes = {key: shape for key, shape in checkpoint.shapes.items() if key not in ignored}
        require_equal(shapes, self.tensors, str(checkpoint.path))
        checkpoint.require_floats(ignored)

    def read(self, checkpoint: Checkpoint, part: Part) -> np.ndarray:
        """Our parameter, or one block's slice of it."""
        row, key, start, stop = self._locations[part]
        return to_ours(checkpoint.read(key, start, stop), row, self.part_shape(part))

    def dtype(self, checkpoint: Checkpoint, part: Part) -> np.dtype:
        """As the file stores it."""
        return checkpoint.dtype(self._locations[part].key)

    def axes(self, part: Part) -> tuple[int, ...]:
        """Their tensor (halves already swapped) transposed by these axes is ours, after leading axes of length 1."""
        return self._locations[part].row.axes or tuple(range(len(self.part_shape(part))))

    def read_cuts(self, checkpoint: Checkpoint, part: Part, cuts: Collection[Cut]) -> dict[Cut, np.ndarray]:
        """Several cuts of a part, each as it lies in their tensor, not transposed (`axes`).

        Of their leading axis nothing is read that no cut holds, and nothing twice, unless cuts overlap in part.
        """
        row, key, start, stop = self._locations[part]
        axes = self.axes(part)
        added, rows, arrays = len(axes) - len(self.part_shape(part)), {}, {}
        for cut in cuts:
            theirs = [slice(None)] * len(axes)
            for axis, (first, last) in zip(axes[added:], cut):
                theirs[axis] = slice(first, last)
            first, last = (0, stop - start) if row.swapped or 0 in axes[:added] else cut[axes.index(0) - added]
            if (first, last) not in rows:
                rows[first, last] = _unswapped(checkpoint.read(key, start + first, start + last), row)
            if not row.swapped:
                theirs[0] = slice(None)
            arrays[cut] = rows[first, last][tuple(theirs)]
        return arrays

    def rows_in(self, source: "Layout", key: str) -> list[RowRange]:
        """Their tensor `key` as rows of the tensors of another layout of this model, byte for byte, in order."""
        return [rows for part in self.parts[key] for rows in self._part_in(source, part)]

    def _part_in(self, source: "Layout", part: Part) -> list[RowRange]:
        here, there = self._locations[part], source._locations[part]
        axes = len(self.part_shape(part))
        if _order(here.row, axes) != _order(there.row, axes):
            raise ValueError(f"{part[0]} lies transposed in {here.key} and {there.key}, so that no bytes can be copied")
        if here.row.swapped == there.row.swapped:
            return [RowRange(there.key, there.start, there.stop)]
        middle = (there.start + there.stop) // 2
        return [RowRange(there.key, middle, there.stop), RowRange(there.key, there.start, middle)]

    def assemble(self, key: str, get: Callable[[Part], np.ndarray]) -> np.ndarray:
        """Their tensor `key`, from our parameters (or slices) that `get` returns."""
        parts = [to_theirs(get(part), self._locations[part].row) for part in self.parts[key]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Stored:
    """A model's parameters in a checkpoint: checked strictly (see Layout.require), not yet read."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        rows: Iterable[Row | tuple],
        shapes: Mapping[str, Any],
        ignored: Collection[str] = (),
    ):
        self.checkpoint, self.layout = checkpoint, Layout(rows, shapes)
        self.layout.require(checkpoint, ignored)

    def load(self, dtype: Any = None) -> dict[str, np.ndarray]:
        """{our path: array} in the host's memory, in the file's dtype or in `dtype`; stacked over blocks."""
        flat: dict[str, np.ndarray] = {}
        for part in self.layout:
            path, layer = part
            array = self.layout.read(self.checkpoint, part)
            if path not in flat:
                flat[path] = np.empty(self.layout.shapes[path], array.dtype if dtype is None else dtype)
            flat[path][... if layer is None else layer] = array
        return flat


def tensors_of(
    flat: Mapping[str, Any], rows: Iterable[Row | tuple], dtype: Any = None
) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
    """({their key: spec}, a function that makes their tensor) of our parameters, in their own dtype or in `dtype`."""
    layout = Layout(rows, flat)
    specs = {
        key: Spec(shape, np.dtype(dtype or flat[layout.parts[key][0][0]].dtype))
        for key, shape in layout.tensors.items()
    }

    def get(part: Part) -> np.ndarray:
        path, layer = part
        return to_host(flat[path] if layer is None else flat[path][layer])

    return specs, lambda key: layout.assemble(key, get)
