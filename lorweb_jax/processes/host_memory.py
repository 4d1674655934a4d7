"""The C library's allocator, told to keep what XLA's CPU backend frees and asks for again with every step."""

import ctypes
import sys

import jax

# Of glibc's malloc.h: option, value.
_KEEP = (
    (-4, 0),  # M_MMAP_MAX: large blocks come from the heap; none is mapped anew, and cleared by the kernel, each time
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD, bytes: what is free at the heap's end stays the process's
    (-2, 2**30),  # M_TOP_PAD, bytes: the heap grows by this much at once
)


def keep_freed_memory() -> bool:
    """Where jax computes on the CPU, ask glibc not to return freed memory to the system; whether it does as asked.

    Without it a training step spends a tenth of its time in the kernel, which takes back and clears the same buffers
    again and again (docs/performance.md). It starts jax's backend.
    """
    if not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    accepted = [mallopt(option, value) for option, value in _KEEP]  # each of them, even where one is refused
    return all(accepted)
