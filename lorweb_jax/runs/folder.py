"""A run's folder: one run at a time, one config, and the data and models that the run began with."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from filelock import FileLock
from jax.experimental import multihost_utils

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.locks import acquire
from lorweb_jax.common.outputs import write_file
from lorweb_jax.common.schema import read_json
from lorweb_jax.runs.checkpoints import complete_steps
from lorweb_jax.settings import config as configs
from lorweb_jax.settings import fields as config_fields
from lorweb_jax.settings.rules import shown

CONFIG, COMMAND, LOCK, SOURCES = "config.json", "command.txt", ".lock", "sources.json"
SHARED_WITHIN = 20.0  # s until a file that process 0 has written is seen by all hosts
# What runs write beside config.json. Where such a thing lies and no config.json of a run, it is somebody else's.
_WRITTEN = {
    "checkpoints",
    "log.txt",
    "outcome.json",
    "command.txt",
    "pictures",
    "export",
    "evaluation",
    "problems.json",
    "encoder.json",
    "quality.json",
    "vae",
    "transformer",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "clip_vision",
}


@contextlib.contextmanager
def owned(workdir: Path) -> Iterator[None]:
    """Within it, this run (its process 0) has the folder to itself. The folder is created if necessary, and removed
    where nothing was written into it, as when the start is refused.

    Raises UserError if the folder can't be written, if another run has it (host and process are named; the lock of a
    process that died is released by the system), or if it holds files of others that this run would replace.
    """
    if jax.process_index():
        yield
        return
    missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"the run folder {workdir} cannot be written ({error.strerror}); "
            "choose another with --workdir, or make room and set its permissions"
        ) from None
    lock = _lock(workdir)
    try:
        _require_runs_own(workdir)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(workdir / LOCK, 0)
            if [path.name for path in workdir.iterdir()] == [LOCK]:
                (workdir / LOCK).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # the first that isn't empty stays, with those above it
            for folder in missing:
                folder.rmdir()


def _lock(workdir: Path) -> FileLock:
    """The folder's lock, acquired; the file then names this process."""
    path = workdir / LOCK
    try:
        lock, acquired = acquire(path, wait=False)
    except OSError as error:
        raise UserError(
            f"the run folder {workdir} can't be locked ({error.strerror}); choose another with --workdir"
        ) from None
    # Without locks the folder is that of whoever the file names and isn't known to be dead.
    if acquired is False or (acquired is None and _runs(_owner(path))):
        owner = _owner(path)
        who = (
            f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
            if owner
            else "another process, which has just begun"
        )
        raise UserError(
            f"the run folder {workdir} belongs to a run that is still at it ({who}); wait for it, stop it, "
            f"or choose another with --workdir (if it is gone, delete {path})"
        )
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    path.write_text(json.dumps(owner))
    return lock


def _owner(path: Path) -> dict | None:
    """{host, pid, since} of whoever has the lock; None if the file doesn't say."""
    try:
        with open(path, "rb") as file:
            owner = json.loads(file.read(1000))
        return owner if type(owner["pid"]) is int and owner.keys() >= {"host", "since"} else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def owner_alive(workdir: Path) -> dict | None:
    """{host, pid, since} of the process that has the folder; None where none has, or it died. Of a process on another
    host it isn't known whether it died."""
    owner = _owner(workdir / LOCK)
    return owner if _runs(owner) else None


def _runs(owner: dict | None) -> bool:
    if owner is None:
        return False
    if owner["host"] != socket.gethostname():
        return True  # who knows
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return owner["pid"] != os.getpid()


def _require_runs_own(workdir: Path) -> None:
    """UserError if the folder holds files that no training run wrote and this one would replace."""
    if (workdir / CONFIG).exists():
        configs.load(workdir / CONFIG)
        return
    foreign = sorted(
        path.name for path in workdir.iterdir() if path.name in _WRITTEN or path.name.startswith("events.out.")
    )
    if foreign:
        raise UserError(
            f"{workdir} holds {', '.join(foreign)}, but no {CONFIG} of a training run, which would replace "
            "them; name a new folder with --workdir"
        )


def open_run(workdir: Path, config, sources: Mapping[str, str], command: str = "") -> None:
    """Write the run's config into its folder, after checking that checkpoints in it are of the same config; and its
    command line, where it has one, into command.txt.

    sources: {dotted field: fingerprint of the files at this path}. Paths are compared by these fingerprints, other
    fields by value, except those that may change (configs.may_change). UserError that names what differs, and where the
    processes of the run don't see the same folder.
    """
    if jax.process_index() == 0:
        if steps := complete_steps(workdir):
            _require_same(workdir, config, sources)
            if config.train.steps < (last := max(steps)):
                raise UserError(
                    f"{workdir} holds a run that is at step {last}, and config.train.steps is {config.train.steps}; "
                    f"give {last} or more, or another --workdir"
                )
        write_file(workdir / SOURCES, (json.dumps(dict(sources), indent=1) + "\n").encode())
        configs.save(config, workdir / CONFIG)
        if command:
            write_file(workdir / COMMAND, (command + "\n").encode(errors="backslashreplace"))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
        _check_shared(workdir, config)


def _require_same(workdir: Path, config, sources: Mapping[str, str]) -> None:
    if not (workdir / CONFIG).exists():
        raise UserError(
            f"{workdir} holds checkpoints, but no {CONFIG}, which says how they were made; name a new folder "
            "with --workdir"
        )
    known: dict[str, str] = {}
    with contextlib.suppress(UserError):  # there is none in older runs' folders
        known = read_json(workdir / SOURCES, dict[str, str])
    earlier = configs.load(workdir / CONFIG)
    if earlier.job != config.job:
        raise UserError(
            f"{workdir} holds a run of the job {earlier.job!r}, and the config is of the job {config.job!r}; name a "
            "new folder with --workdir"
        )
    differing = configs.differences(earlier, config)
    # Where the embedded data are built and what is precomputed: made anew, the same comes of it. Of data that no
    # fingerprint was kept of, the saved position tells whether they are the same.
    free = {
        field
        for field in config_fields.paths(config.job)
        if field in known or field in ("precomputed", "data.root", "data.held_out") or field.endswith("cache")
    }
    changed = [
        f"{name} was {shown(old)} and is {shown(new)}"
        for name, (old, new) in differing.items()
        if not (configs.may_change(name) or name in free)
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run with another config: {', '.join(changed)}; "
            "use the same values to go on with it, or another --workdir"
        )
    if other := [field for field in known if known[field] != sources.get(field)]:
        fields = ", ".join(f"{field} ({configs.get(config, field) or 'the default'})" for field in other)
        raise UserError(
            f"{workdir} holds a run that began with other files than those of {fields}; give the same ones to "
            f"go on with it, or another --workdir (or delete {workdir / SOURCES} to go on with these)"
        )


def _check_shared(workdir: Path, config) -> None:
    """UserError unless this process sees the config that process 0 wrote, within SHARED_WITHIN seconds."""
    path, end = workdir / CONFIG, time.monotonic() + SHARED_WITHIN
    while not path.exists() or configs.differences(configs.load(path), config):
        if time.monotonic() > end:
            raise UserError(
                f"the run folder {workdir.absolute()} of process 0 is not the one that process "
                f"{jax.process_index()} sees on {socket.gethostname()}; give with --workdir a folder on a "
                "file system that all hosts share"
            )
        time.sleep(0.5)
