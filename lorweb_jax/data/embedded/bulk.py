"""Every operation on every drawing, by several processes at once."""

import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np

from lorweb_jax.data.embedded.operations import OPERATIONS, on_white

CHUNK = 64  # drawings a process takes at a time


def operated(images: np.ndarray, names: Sequence[str], processes: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """The drawings `images` uint8 [D,H,W,4] after each operation in `names` ("" leaves it as it is, on white).

    Yields (start, stop, uint8 [stop − start, names, H, W, 3]) in order, as fast as `processes` worker processes, which
    import numpy and Pillow alone, can make them. KeyError for a name that isn't an operation's.
    """
    for name in names:
        _effect(name)
    starts = range(0, len(images), CHUNK)
    if processes <= 1:
        yield from ((*_bounds(images, start), operated_chunk(images[start : start + CHUNK], names)) for start in starts)
        return
    # A file that all map into their memory: shared memory of its own is too small on some machines.
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/images.npy", images)
        context = multiprocessing.get_context("spawn")  # a fork of a process that runs jax may hang
        with context.Pool(processes, _open, (f"{folder}/images.npy", tuple(names))) as pool:
            for start, result in zip(starts, pool.imap(_work, starts)):
                yield *_bounds(images, start), result


def operated_chunk(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """uint8 [D, names, H, W, 3] of a few drawings, in this process."""
    return np.stack([[_effect(name)(image) for name in names] for image in images])


def _bounds(images: np.ndarray, start: int) -> tuple[int, int]:
    return start, min(start + CHUNK, len(images))


def _effect(name: str):
    return OPERATIONS[name].apply if name else on_white


# Of a worker process: the drawings, and the operations of the table that it helps to make.
_images: np.ndarray
_names: tuple[str, ...]


def _open(path: str, names: tuple[str, ...]) -> None:
    global _images, _names
    _images, _names = np.load(path, mmap_mode="r"), names


def _work(start: int) -> np.ndarray:
    return operated_chunk(_images[start : start + CHUNK], _names)
