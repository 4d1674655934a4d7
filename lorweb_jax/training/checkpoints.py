"""A run's checkpoints (orbax): trainables, optimizer, step, data position and the metrics not yet logged.

Frozen weights are never in them. A checkpoint counts once it is complete: orbax writes to a temporary name first,
so that a run killed at any moment goes on from the one before. They are written while training goes on.
"""

import base64
import logging
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lorweb_jax import config as configs
from lorweb_jax.errors import UserError

# orbax reports each stage of a save, and prints tracebacks of errors that it raises as well.
logging.getLogger("absl").setLevel(logging.CRITICAL)

FOLDER, CONFIG = "checkpoints", "config.json"
KEEP = 3
SHARED_WITHIN = 20.0  # s until a file that process 0 has written is seen by all hosts


def open_run(workdir: Path, config) -> None:
    """Make the run folder, or check that it can be written to and that its checkpoints are of this config.

    UserError where the folder cannot be written, holds checkpoints of another config (the difference is shown;
    configs.MAY_CHANGE lists what may differ), or is not the same one for all processes of the run.
    """
    if jax.process_index() == 0:
        _open_run(workdir, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run folder")
        _check_shared(workdir, config)


def _open_run(workdir: Path, config) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise UserError(f"the run folder {workdir} cannot be written ({error.strerror}); "
                        "choose another with --workdir, or make room and set its permissions") from None
    path = workdir / CONFIG
    if path.exists() and _steps(workdir):
        changed = {name: values for name, values in configs.differences(configs.load(path), config).items()
                   if name not in configs.MAY_CHANGE}
        if changed:
            shown = ", ".join(f"{name} was {old!r} and is {new!r}" for name, (old, new) in changed.items())
            raise UserError(f"{workdir} holds a run with another config: {shown}; "
                            "use the same values to go on with it, or another --workdir")
    configs.save(config, path)


def _check_shared(workdir: Path, config) -> None:
    """UserError unless this process sees what process 0 wrote; network file systems may need some seconds."""
    path, end = workdir / CONFIG, time.monotonic() + SHARED_WITHIN
    while not path.exists() or configs.differences(configs.load(path), config):
        if time.monotonic() > end:
            raise UserError(f"the run folder {workdir.absolute()} of process 0 is not the one that process "
                            f"{jax.process_index()} sees on {socket.gethostname()}; give with --workdir a folder on a "
                            "file system that all hosts share")
        time.sleep(0.5)


def goes_on(workdir: Path) -> str:
    """What the same command would do now, as part of a sentence."""
    steps = _steps(workdir)
    return f"the same command goes on from step {max(steps)}" if steps else "the same command begins again"


class Checkpoints:
    """Saves and restores a run's state in `workdir`/checkpoints, keeping the latest KEEP."""

    def __init__(self, workdir: Path):
        self.folder = workdir / FOLDER
        self.manager = ocp.CheckpointManager(
            self.folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=KEEP, create=True))

    def latest(self) -> int | None:
        """Number of steps done in the newest complete checkpoint; None where there is none."""
        return self.manager.latest_step()

    def save(self, step: int, trainable: dict[str, jax.Array], opt_state: Any, data_state: Any,
             log_state: Any) -> None:
        """Begin to write the state after `step` steps; returns once the arrays may be donated.

        UserError where there is no room for it, or where it or the one before it could not be written.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves((trainable, opt_state))) + 2**20
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            self.finish()
            raise self._not_written(f"it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
        try:
            self.manager.save(step, args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(trainable),
                optimizer=ocp.args.StandardSave(opt_state),
                progress=ocp.args.JsonSave({"data": _to_json(data_state), "log": log_state})))
        except Exception as error:
            raise self._not_written(error) from error

    def finish(self) -> None:
        """Wait until what `save` began is on disk; UserError if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(self, step: int, trainable: Any, opt_state: Any) -> tuple[dict[str, jax.Array], Any, Any, Any]:
        """(trainable, opt_state, data_state, log_state) of a checkpoint; the first two onto the shardings of the
        trees of ShapeDtypeStruct given. UserError for one that is damaged or of another size.
        """
        try:
            held = self.manager.restore(step, args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(trainable),
                optimizer=ocp.args.StandardRestore(opt_state),
                progress=ocp.args.JsonRestore()))
        except Exception as error:
            raise UserError(f"the checkpoint {self.folder / str(step)} does not fit this model or is damaged "
                            f"({_in_a_line(error)}); delete that folder to go on from the one before it") from error
        return held.trainable, held.optimizer, _from_json(held.progress["data"]), held.progress["log"]

    def close(self) -> None:
        try:
            self.manager.close()
        except Exception as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception | str) -> UserError:
        steps = _steps(self.folder.parent)
        kept = f"the run goes on from step {max(steps)}" if steps else "no checkpoint was complete yet"
        return UserError(f"a checkpoint could not be written to {self.folder} ({_in_a_line(error)}); "
                         f"make room and run the same command again: {kept}")


def restore_trainables(workdir: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], Any]:
    """(trained weights by dotted path, config) of a run folder, at its newest checkpoint or at `step`.

    Where the run keeps averaged weights, these are what is given. UserError where there is no such checkpoint.
    """
    config = configs.load(workdir / CONFIG)
    steps = _steps(workdir)
    if not steps:
        raise UserError(f"{workdir} holds no complete checkpoint; train for longer, or name another run folder")
    step = max(steps) if step is None else step
    if step not in steps:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; it has {sorted(steps)}")
    folder = (workdir / FOLDER / str(step)).absolute()
    item = folder / ("optimizer" if config.train.ema else "trainable")
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(item).item_metadata.tree
            held = checkpointer.restore(item, restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))
    except Exception as error:
        raise UserError(f"the checkpoint {folder} is damaged ({_in_a_line(error)}); "
                        "name another run folder or step") from error
    if not config.train.ema:
        return held, config
    return next(part["average"] for part in held if isinstance(part, dict) and "average" in part), config


def _steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints."""
    folder = workdir / FOLDER
    return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def _to_json(state: Any) -> Any:
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _from_json(state: Any) -> Any:
    return base64.b64decode(state["base64"]) if isinstance(state, dict) and state.keys() == {"base64"} else state


def _in_a_line(error: Exception | str) -> str:
    """The first line of an error, without the beginning where it is long: tensorstore names the cause last."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else "… " + line[-160:]
