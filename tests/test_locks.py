"""Locks between processes."""

import fcntl
import signal
import subprocess
import sys

import pytest

from lorweb_jax.common.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from lorweb_jax.common.locks import locked
with locked(Path(sys.argv[1]), wait=True):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_free_once_its_process_is_dead(tmp_path):
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with locked(path, wait=False) as ours:
        assert not ours
    assert path.exists()
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    for wait in (False, True):
        with locked(path, wait=wait) as ours:
            assert ours
        assert not path.exists()


def test_without_locks_on_the_file_system_everyone_has_it(tmp_path, monkeypatch):
    def flock(file, kind):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)  # which filelock calls
    path = tmp_path / ".lock"
    with locked(path, wait=False) as first, locked(path, wait=True) as second:
        assert first and second
    assert not path.exists()


def test_where_no_file_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), locked(tmp_path / "file" / ".lock", wait=True):
        pass
