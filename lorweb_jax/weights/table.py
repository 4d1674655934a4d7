"""Conversion as data: a table of rows says where each of our parameters lies in a foreign layout.

The same table serves both directions, one parameter (or one block's slice of it) at a time. It is strict: every
parameter has its tensor, every tensor has its parameter, every shape agrees, or nothing is converted.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lorweb_jax.errors import UserError
from lorweb_jax.weights.safetensors_io import Checkpoint, Spec
from lorweb_jax.weights.state import require_equal


class Row(NamedTuple):
    """One of our parameters and its tensor in the foreign layout.

    path: our dotted path. key: their name; "{l}" stands for the block index, the leading axis of ours.
    axes: their tensor transposed by these axes is ours (None: as it is). Where ours has fewer axes than theirs, the
        leading ones have length 1 (a linear layer stored as a 1x1 convolution).
    swapped: the two halves of their leading axis lie the other way round.
    Rows with the same key are the parts of one fused tensor, along its leading axis in the table's order.
    Rows of paths that a model does not have are passed over.
    """

    path: str
    key: str
    axes: tuple[int, ...] | None = None
    swapped: bool = False


LINEAR = (1, 0)      # [o, i] <-> [i, o]
CONV = (2, 3, 1, 0)  # [o, i, kh, kw] <-> [kh, kw, i, o]

Part = tuple[str, int | None]  # our path and the block index, None for a parameter without the leading axis l


class _Place(NamedTuple):
    row: Row
    key: str
    start: int  # rows of the tensor's leading axis
    stop: int


def to_ours(array: np.ndarray, row: Row, shape: tuple[int, ...]) -> np.ndarray:
    """Their part of a tensor -> our parameter (or slice) of `shape`; a view where it can be."""
    if row.swapped:
        array = np.concatenate(np.split(array, 2)[::-1])
    return (array if row.axes is None else array.transpose(row.axes)).reshape(shape)


def to_theirs(array: np.ndarray, row: Row) -> np.ndarray:
    """Inverse of `to_ours`."""
    if row.axes is not None:
        array = array.reshape((1,) * (len(row.axes) - array.ndim) + array.shape).transpose(np.argsort(row.axes))
    return np.concatenate(np.split(array, 2)[::-1]) if row.swapped else array


class Layout:
    """Where each parameter of a model lies in a foreign layout: a table applied to the model's shapes.

    rows: Row or plain tuples. shapes: {our path: anything with .shape}, of the whole model.
    `tensors` is {their key: shape}, complete. Raises UserError if a path of the model has no row.
    """

    def __init__(self, rows: Iterable[Row | tuple], shapes: Mapping[str, Any]):
        self.shapes = {path: tuple(value.shape) for path, value in shapes.items()}
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.parts: dict[str, list[Part]] = {}
        self._places: dict[Part, _Place] = {}
        for row in (Row(*row) for row in rows):
            if row.path in self.shapes:
                depth = self.shapes[row.path][0] if "{l}" in row.key else None
                for layer in range(depth) if depth is not None else [None]:
                    self._add(row, layer)
        covered = {path for path, _ in self._places}
        if absent := [path for path in self.shapes if path not in covered]:
            raise UserError(f"the conversion table has no row for {absent[0]} ({len(absent)} such); "
                            "the model and the table do not belong together")

    def _add(self, row: Row, layer: int | None) -> None:
        key = row.key if layer is None else row.key.replace("{l}", str(layer))
        # A broadcast zero has the shape without the memory.
        shape = to_theirs(np.broadcast_to(np.int8(0), self.part_shape((row.path, layer))), row).shape
        start = self.tensors[key][0] if key in self.tensors else 0
        self._places[row.path, layer] = _Place(row, key, start, start + shape[0])
        self.tensors[key] = (start + shape[0], *shape[1:])
        self.parts.setdefault(key, []).append((row.path, layer))

    def part_shape(self, part: Part) -> tuple[int, ...]:
        path, layer = part
        return self.shapes[path] if layer is None else self.shapes[path][1:]

    def __iter__(self) -> Iterator[Part]:
        """Parts in the table's order: a stacked parameter's blocks one after another."""
        return iter(self._places)

    def require(self, checkpoint: Checkpoint, ignored: Collection[str] = ()) -> None:
        """UserError with the differences unless the checkpoint holds just this layout's tensors (and `ignored`)."""
        found = {key: shape for key, shape in checkpoint.shapes.items() if key not in ignored}
        require_equal(found, self.tensors, str(checkpoint.path))

    def read(self, checkpoint: Checkpoint, part: Part) -> np.ndarray:
        """Our parameter, or one block's slice of it, from the checkpoint."""
        row, key, start, stop = self._places[part]
        return to_ours(checkpoint.read(key, start, stop), row, self.part_shape(part))

    def dtype(self, checkpoint: Checkpoint, part: Part) -> np.dtype:
        return checkpoint.dtype(self._places[part].key)

    def assemble(self, key: str, get: Callable[[Part], np.ndarray]) -> np.ndarray:
        """Their tensor `key`, from our parameters (or slices) that `get` returns."""
        parts = [to_theirs(get(part), self._places[part].row) for part in self.parts[key]]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def iter_parameters(checkpoint: Checkpoint, rows: Iterable[Row | tuple], shapes: Mapping[str, Any],
                    ignored: Collection[str] = ()) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(our path, block index or None, array) of every parameter, one at a time; checked strictly before the first."""
    layout = Layout(rows, shapes)
    layout.require(checkpoint, ignored)
    for path, layer in layout:
        yield path, layer, layout.read(checkpoint, (path, layer))


def load_parameters(checkpoint: Checkpoint, rows: Iterable[Row | tuple], shapes: Mapping[str, Any],
                    dtype: Any = None, ignored: Collection[str] = ()) -> dict[str, np.ndarray]:
    """{our path: array}, in the file's dtype or in `dtype`; stacked over blocks."""
    flat: dict[str, np.ndarray] = {}
    for path, layer, array in iter_parameters(checkpoint, rows, shapes, ignored):
        if path not in flat:
            flat[path] = np.empty(shapes[path].shape, array.dtype if dtype is None else dtype)
        flat[path][... if layer is None else layer] = array
    return flat


def tensors_of(flat: Mapping[str, Any], rows: Iterable[Row | tuple], dtype: Any = None
               ) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
    """({their key: spec}, a function that makes their tensor) of our parameters, in their own dtype or in `dtype`."""
    layout = Layout(rows, flat)
    specs = {key: Spec(shape, np.dtype(dtype or flat[layout.parts[key][0][0]].dtype))
             for key, shape in layout.tensors.items()}

    def get(part: Part) -> np.ndarray:
        path, layer = part
        return np.asarray(flat[path] if layer is None else flat[path][layer])

    return specs, lambda key: layout.assemble(key, get)


def tensors_between(checkpoint: Checkpoint, source: Layout, target: Layout, dtype: Any = None
                    ) -> tuple[dict[str, Spec], Callable[[str], np.ndarray]]:
    """Like `tensors_of`, from a checkpoint in the layout `source` to the layout `target` of the same model."""
    source.require(checkpoint)
    specs = {key: Spec(shape, np.dtype(dtype or source.dtype(checkpoint, target.parts[key][0])))
             for key, shape in target.tensors.items()}
    return specs, lambda key: target.assemble(key, lambda part: source.read(checkpoint, part))
