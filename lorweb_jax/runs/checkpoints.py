"""A run's checkpoints (orbax): the training state, one pytree, with the data position and the metrics not yet logged.

Frozen weights of the base model are not saved. Checkpoints are written while training goes on, to a temporary name
first: a run that is killed at any moment resumes from the last complete one. Each holds checksums of its files; where
these differ, the checkpoint before it is used.
"""

import base64
import logging
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lorweb_jax.common.errors import UserError
from lorweb_jax.runs import checksums
from lorweb_jax.settings import config as configs

# orbax reports each stage of a save, and prints tracebacks of errors that it raises as well; asyncio those of the other
# reads of a restore that failed.
for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)

FOLDER, CONFIG = "checkpoints", "config.json"
KEEP = 3


class Restored(NamedTuple):
    """What a checkpoint holds: the state after `step` steps."""

    step: int
    state: Any
    data_state: Any
    log_state: Any


def goes_on(workdir: Path) -> str:
    """What the same command would do now, as the end of a message."""
    steps = complete_steps(workdir)
    return f"the same command goes on from step {max(steps)}" if steps else "the same command begins again"


class Checkpoints:
    """Saves and restores a run's state in `workdir`/checkpoints, keeping the latest KEEP."""

    def __init__(self, workdir: Path):
        self.folder = workdir / FOLDER
        self._saving = 0
        self.manager = ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEEP,
                create=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
            ),
        )

    def _write_checksums(self) -> None:
        """Called by orbax in process 0, in the thread that saves, once all is written under a temporary name."""
        [*_, newest] = sorted(
            self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*"), key=lambda path: path.stat().st_mtime_ns
        )
        checksums.write(newest)

    def latest(self) -> int | None:
        """Number of steps done in the newest complete checkpoint; None where there is none."""
        return self.manager.latest_step()

    def restore_newest(self, shapes: Any) -> Restored | None:
        """The newest intact checkpoint, restored as `restore` does; None where there is no checkpoint. Damaged ones are
        renamed and reported. UserError where none can be restored.
        """
        wrong: dict[int, str] = {}
        while (step := self._newest_intact(wrong)) is not None:
            try:
                restored = self.restore(step, shapes)
            except UserError as error:
                # With checksums that hold, or where other processes have begun to restore it, there is nothing to try.
                if (self.folder / str(step) / checksums.FILE).exists() or jax.process_count() > 1:
                    raise
                wrong[step] = str(error)
                continue
            self._set_aside(wrong, step)
            return restored
        if wrong:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be restored: in that of step {max(wrong)}, "
                f"{wrong[max(wrong)]}; bring back an intact copy, or choose another --workdir to begin again"
            )
        return None

    def _newest_intact(self, wrong: dict[int, str]) -> int | None:
        """The newest step whose files process 0 finds intact; what is wrong with later ones goes into `wrong`."""
        newest = -1
        if jax.process_index() == 0:
            for step in sorted(set(complete_steps(self.folder.parent)) - wrong.keys(), reverse=True):
                damage = checksums.damage(self.folder / str(step))
                if damage is None:
                    newest = step
                    break
                wrong[step] = damage
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def _set_aside(self, wrong: Mapping[int, str], instead: int) -> None:
        for step in sorted(wrong):
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            print(
                f"the checkpoint of step {step} is damaged ({wrong[step]}): it is kept as {aside}, and the run goes on "
                f"from step {instead}",
                flush=True,
            )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self.manager.reload()

    def save(self, step: int, state: Any, data_state: Any, log_state: Any) -> None:
        """Begin to write the training state after `step` steps; returns once the arrays may be donated.

        UserError where there is no room for it, or where it or the one before it could not be written.
        """
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            self.finish()
            raise self._not_written(f"it needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
        self.finish()
        self._saving = step
        try:
            self.manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    progress=ocp.args.JsonSave({"data": _to_json(data_state), "log": log_state}),
                ),
            )
        except Exception as error:
            raise self._not_written(error) from error

    def finish(self) -> None:
        """Wait until what `save` began is on disk; UserError if it could not be written."""
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def restore(self, step: int, shapes: Any) -> Restored:
        """A checkpoint, its arrays onto the shardings of `shapes`, a training state of ShapeDtypeStruct. UserError for
        one that can't be read or is of another size.
        """
        try:
            items: Any = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
            )
            return Restored(step, items.state, _from_json(items.progress["data"]), items.progress["log"])
        except Exception as error:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} does not fit this model or is damaged "
                f"({_in_a_line(error)}); delete that folder to go on from the one before it"
            ) from error

    def close(self) -> None:
        try:
            self.manager.close()
        except Exception as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception | str) -> UserError:
        steps = complete_steps(self.folder.parent)
        advice = f"the run goes on from step {max(steps)}" if steps else "no checkpoint was complete yet"
        return UserError(
            f"a checkpoint could not be written to {self.folder} ({_in_a_line(error)}); "
            f"make room and run the same command again: {advice}"
        )


def restore_trainables(workdir: Path, step: int | None = None) -> tuple[dict[str, np.ndarray], Any]:
    """(trained weights by dotted path, config) of a run folder, at its newest intact checkpoint or at `step`; with them
    the frozen parameters of its basis.

    Averaged weights where the run keeps an average. UserError where there is no such checkpoint.
    """
    config = configs.load(workdir / CONFIG)
    steps = sorted(complete_steps(workdir), reverse=True)
    if not steps:
        raise UserError(f"{workdir} holds no complete checkpoint; train for longer, or name another run folder")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} holds no checkpoint of step {step}; it has {sorted(steps)}")
    errors: list[UserError] = []
    for number in steps if step is None else [step]:
        try:
            weights = _read_trainables(workdir / FOLDER / str(number), config.train.ema > 0)
        except UserError as error:
            errors.append(error)
            continue
        if errors:
            print(f"note: {errors[0]}; that of step {number} is taken", file=sys.stderr, flush=True)
        return weights, config
    raise errors[0]


def _read_trainables(folder: Path, averaged: bool) -> dict[str, np.ndarray]:
    if wrong := checksums.damage(folder, ("state",)):
        raise UserError(f"the checkpoint {folder} is damaged ({wrong})")
    path, part = (folder / "state").absolute(), "average" if averaged else "trainable"
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            # Of the state this part alone is read: the optimizer's is twice as large.
            tree = checkpointer.metadata(path).item_metadata.tree
            tree = {name: tree[name] for name in (part, "constants") if tree.get(name)}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            arguments = ocp.args.PyTreeRestore(item=tree, restore_args=as_numpy, partial_restore=True)
            arrays = checkpointer.restore(path, args=arguments)
            return arrays[part] | arrays.get("constants", {})
    except Exception as error:
        raise UserError(f"the checkpoint {folder} is damaged ({_in_a_line(error)})") from error


def complete_steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints, in any order."""
    folder = workdir / FOLDER
    return ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []


def _to_json(state: Any) -> Any:
    return {"base64": base64.b64encode(state).decode()} if isinstance(state, bytes) else state


def _from_json(state: Any) -> Any:
    return base64.b64decode(state["base64"]) if isinstance(state, dict) and state.keys() == {"base64"} else state


def _in_a_line(error: Exception | str) -> str:
    """The first line of an error; of a long one its end, where tensorstore names the cause."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 160 else "… " + line[-160:]
