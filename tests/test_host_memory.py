"""Freed memory stays with the process once it was asked for: measured in one of its own."""

import platform
import subprocess
import sys

import pytest

RESIDENT = """
import ctypes, resource
from lorweb_jax.processes.host_memory import keep_freed_memory

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range({times}):
    block = libc.malloc(2**26)
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_a_block_is_mapped_once():
    """Ten times the same 64 MiB: without it, 16,384 pages of 4 KiB are faulted in each time."""
    one, ten = (
        int(subprocess.run([sys.executable, "-c", RESIDENT.format(times=n)], capture_output=True, check=True).stdout)
        for n in (1, 10)
    )
    assert ten - one < 2000
