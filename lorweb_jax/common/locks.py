"""Locks between processes (filelock): the system takes them from a process that dies."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

# What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock on the file `path`; False where another has it and `wait` is False.

    The file is removed with the lock. On a file system without locks, every process that asks has it.
    Raises OSError if the file can't be made.
    """
    from filelock import FileLock, Timeout  # weights are also loaded where it isn't installed

    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
        ours = True
    except Timeout:
        ours = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        ours = True
    try:
        yield ours
    finally:
        if ours:
            path.unlink(missing_ok=True)  # whoever waits for the removed file's lock asks again
            lock.release()
