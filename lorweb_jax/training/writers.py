"""Where a run's metrics go, through clu's interface: a text log, TensorBoard, and trackers that the config names."""

import importlib
import importlib.util
import json
import os
import re
import secrets
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_file
from lorweb_jax.common.user_files import regular_file

# tensorboardX imports torch where that is installed, which takes seconds and serves nothing here.
if "torch" not in sys.modules:
    sys.modules["torch"] = cast(types.ModuleType, None)  # an ImportError, which tensorboardX expects
from tensorboardX import event_file_writer, summary  # noqa: E402
from tensorboardX.proto.event_pb2 import Event, SessionLog  # noqa: E402

if sys.modules["torch"] is None:
    del sys.modules["torch"]

# clu's own summary writer is the one part of clu.metric_writers that needs TensorFlow. A module of that name
# with our writer goes in its place before the first import.
_stand_in = types.ModuleType("clu.metric_writers.summary_writer")
sys.modules["clu.metric_writers.summary_writer"] = _stand_in
_stand_in.SummaryWriter = None
from clu import metric_writers  # noqa: E402

LOG, TRACKED = "log.txt", "tracked.txt"
PROJECT = "lorweb_jax"  # of all runs, in a tracker


class _Writer(metric_writers.MetricWriter):
    """A clu writer of scalars and images, the only kinds of metrics that runs have."""

    def _refuse(self, *args, **kwargs):
        raise NotImplementedError(f"{type(self).__name__} writes scalars and images only")

    write_summaries = write_videos = write_audios = write_histograms = write_texts = write_hparams = _refuse

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        pass


class TextWriter(_Writer):
    """One line per step with all digits of a float32, so that equal runs have equal logs."""

    def __init__(self, path: Path, first_step: int):
        """Removes lines of steps after `first_step`, which a run wrote before it was killed and will write again, and a
        last line without an end. Other lines stay as they are. UserError if the file can't be read or written."""
        if os.path.lexists(path):
            regular_file(path, "check what lies there")
        try:
            *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
            write_file(path, b"".join(line + b"\n" for line in lines if not _later(line, first_step)))
            self.file = path.open("a")
        except OSError as error:
            raise UserError(
                f"the log {path} can't be read and written ({error.strerror}); check what lies there and "
                "its permissions"
            ) from None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self.file.write(f"step {step}" + "".join(f"  {name} {value:.9g}" for name, value in scalars.items()) + "\n")
        self.file.flush()

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _later(line: bytes, step: int) -> bool:
    """Whether a line of the log is one of a later step."""
    found = re.match(rb"step (\d{1,12})  ", line)
    return found is not None and int(found[1]) > step


class SummaryWriter(_Writer):
    """TensorBoard event files, written in this thread: a full disk raises here instead of hanging a queue."""

    def __init__(self, logdir: Path, first_step: int):
        self.events = event_file_writer.EventsWriter(str(logdir / "events"))
        # TensorBoard then drops what an earlier, killed run wrote after this step.
        self.events.write_event(
            Event(wall_time=time.time(), step=first_step + 1, session_log=SessionLog(status=SessionLog.START))
        )

    def _write(self, step: int, value: Any) -> None:
        self.events.write_event(Event(wall_time=time.time(), step=step, summary=value))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._write(step, summary.scalar(name, value))
        self.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        for name, value in images.items():
            self._write(step, summary.image(name, value, dataformats="HWC"))
        self.flush()

    def flush(self) -> None:
        self.events.flush()

    def close(self) -> None:
        self.events.close()


_stand_in.SummaryWriter = SummaryWriter


def require_trackers(names: Sequence[str]) -> None:
    """UserError for a tracker that isn't installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder wandb/ is no package
            raise UserError(
                f"config.trackers names {name}, which is not installed; pip install 'lorweb_jax[{name}]', or leave it "
                "out",
                2,
            )


class TrackerWriter(_Writer):
    """A run of Weights & Biases, or of trackio, which has its interface: of the run folder's name, in PROJECT.

    Training that goes on continues the tracked run; the run folder keeps its id. Weights & Biases keeps files of its
    own in the run folder too. Raises UserError where the tracker can't begin.
    """

    def __init__(self, name: str, workdir: Path, config):
        self.name, self._module = name, importlib.import_module(name)
        if not (workdir / TRACKED).exists():
            write_file(workdir / TRACKED, f"{secrets.token_hex(4)}\n".encode())
        key, folder = (workdir / TRACKED).read_text().strip(), workdir.resolve().name
        values = json.loads(json.dumps(config.to_dict()))  # tuples as lists
        options = {"project": PROJECT, "config": values, "resume": "allow"}
        if name == "wandb":
            # The terminal has a bar that moves, of which each state would be a line.
            settings = self._module.Settings(console="off")
            options |= {"id": key, "name": folder, "dir": str(workdir), "settings": settings}
        else:
            options |= {"name": f"{folder} {key}", "embed": False}  # trackio knows runs by their names
        try:
            self._module.init(**options)
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            offline = "set WANDB_MODE=offline, " if name == "wandb" else ""
            raise UserError(
                f"{name} could not begin a run ({line}); see to that, {offline}or leave it out of config.trackers"
            ) from error

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._module.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        self._module.log({name: self._module.Image(image) for name, image in images.items()}, step=step)

    def flush(self) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        """End the tracked run. failed: by an error, which Weights & Biases then shows."""
        self._module.finish(**{"exit_code": int(failed)} if self.name == "wandb" else {})
