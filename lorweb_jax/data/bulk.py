"""Every operation on every drawing, by several processes at once."""

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.shared_memory import SharedMemory

import numpy as np

from lorweb_jax.data.operations import OPERATIONS, on_white

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
        yield from ((*_bounds(images, start), operated_chunk(images[start:start + CHUNK], names)) for start in starts)
        return
    shared = SharedMemory(create=True, size=images.nbytes)
    try:
        np.ndarray(images.shape, np.uint8, shared.buf)[:] = images
        context = multiprocessing.get_context("spawn")              # a fork of a process that runs jax may hang
        with context.Pool(processes, _open, (shared.name, images.shape, tuple(names))) as pool:
            for start, result in zip(starts, pool.imap(_work, starts)):
                yield *_bounds(images, start), result
    finally:
        shared.close()
        shared.unlink()


def operated_chunk(images: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """uint8 [D, names, H, W, 3] of a few drawings, in this process."""
    return np.stack([[_effect(name)(image) for name in names] for image in images])


def _bounds(images: np.ndarray, start: int) -> tuple[int, int]:
    return start, min(start + CHUNK, len(images))


def _effect(name: str):
    return OPERATIONS[name].apply if name else on_white


def _open(name: str, shape: tuple[int, ...], names: tuple[str, ...]) -> None:
    global _shared, _images, _names
    _shared = SharedMemory(name=name)                               # kept, or the memory would go
    _images, _names = np.ndarray(shape, np.uint8, _shared.buf), names


def _work(start: int) -> np.ndarray:
    return operated_chunk(_images[start:start + CHUNK], _names)
