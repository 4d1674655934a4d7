"""Compiled programs kept on disk, so that a run that starts again doesn't compile them again."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = ".compile_cache"  # beside the run folders, which share it


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Within it, jax keeps programs that took it a second or more to compile in `folder`, and takes them from there.

    jax tells them apart by program, versions, compiler options and kind of device (of CPUs by their instructions); the
    folder may be deleted at any time. A cache that jax was given already (JAX_COMPILATION_CACHE_DIR) is left to it.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # what was compiled before has settled that there is none
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
