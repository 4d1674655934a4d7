"""Locks between processes (filelock): the system takes them from a process that dies."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import FileLock

# What file systems without locks answer.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock on the file `path`; False where another has it and `wait` is False.

    The file is removed with the lock. On a file system without locks, every process that asks has it.
    Raises OSError if the file can't be made.
    """
    lock, acquired = acquire(path, wait=wait)
    ours = acquired is not False
    try:
        yield ours
    finally:
        if ours:
            path.unlink(missing_ok=True)  # whoever waits for the removed file's lock asks again
            lock.release()


def acquire(path: Path, *, wait: bool) -> tuple[FileLock, bool | None]:
    """(the lock on the file `path`, whether it was acquired; None on a file system without locks).

    It is False only where another process has the lock and `wait` is False. Raises OSError if the file can't be made.
    """
    from filelock import FileLock, Timeout  # weights are also loaded where it isn't installed

    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        return lock, False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return lock, None
    return lock, True
