"""What a run reports: metrics in a text log and for TensorBoard (both clu metric writers), and progress on stdout."""

import contextlib
import math
import os
import re
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.outputs import write_file
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.common.user_files import regular_file
from lorweb_jax.images import pictures

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

LOG = "log.txt"


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


class Report:
    """Collects each step's metrics, and every `log_every` steps writes their means and a line of progress.

    Metrics stay on the device until then: no step waits for another's loss.
    """

    def __init__(self, workdir: Path, config, first_step: int, log_state: list[dict[str, float]]):
        self.workdir = workdir
        self.total, self.batch, self.every = config.train.steps, config.train.batch, config.train.log_every
        self.writes = jax.process_index() == 0  # the others keep the same metrics, for the checkpoint
        self.summaries = SummaryWriter(workdir, first_step) if self.writes else None
        self.writer = metric_writers.MultiWriter(
            [TextWriter(workdir / LOG, first_step), self.summaries] if self.writes else []
        )
        self.means = list(log_state)  # metrics of steps that are not logged yet, on the host
        self.waiting: list[tuple[int, dict[str, jax.Array]]] = []  # (step, metrics on the device)
        self.bar: tqdm | None = None

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the metrics of the step with index `step` (from 0)."""
        self.waiting.append((step, metrics))
        if self.bar is None:  # the first step compiles; time counts from its end
            jax.block_until_ready(metrics)
            self.bar = progress_bar(
                "step",
                self.total * self.batch,
                (step + 1) * self.batch,
                seconds=0,
                line="{desc}{postfix}, {rate_fmt}, {remaining} left",
                unit=" examples",
            )

    def collect(self) -> None:
        """Wait for the metrics; UserError that names the first step whose loss is not finite."""
        for step, metrics in jax.device_get(self.waiting):
            if not math.isfinite(metrics["loss"]):
                raise UserError(
                    f"the loss is {metrics['loss']} at step {step + 1}; training stopped and the last "
                    "good checkpoint is kept: lower --config.optimizer.learning_rate or look at the data "
                    "and run the command again"
                )
            self.means.append({name: float(value) for name, value in metrics.items()})
        self.waiting = []

    def state(self) -> list[dict[str, float]]:
        """The metrics that a later log line still needs, for the checkpoint."""
        self.collect()
        return self.means

    def end_progress(self) -> None:
        """On a terminal, what is printed next begins a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def restart_clock(self) -> None:
        """Exclude what happened since the last line (images) from the speed."""
        if self.bar is not None:
            self.bar.unpause()

    def write(self, steps_done: int, learning_rate: float) -> None:
        """Log the means since the last line, and show progress."""
        self.collect()
        names = dict.fromkeys(["loss", *(name for metrics in self.means for name in metrics)])
        # A phase that began meanwhile has metrics from then on.
        means = {name: float(np.mean([metrics[name] for metrics in self.means if name in metrics])) for name in names}
        means["learning_rate"] = learning_rate
        self.means = []
        self._write("write_scalars", steps_done, means)
        self.bar.set_description_str(f"step {steps_done}/{self.total}", refresh=False)
        self.bar.set_postfix_str(f"loss {means['loss']:.5f}", refresh=False)
        if not self.bar.update(steps_done * self.batch - self.bar.n):  # the first step, whose speed isn't known
            self.bar.refresh()
        if steps_done == self.total:
            self.end_progress()

    def log_images(self, steps_done: int, shown: Mapping[str, np.ndarray | float]) -> None:
        """Images uint8 [h, w, 3] by name into workdir/pictures and for TensorBoard, and numbers for the latter."""
        if self.writes:
            images = {name: value for name, value in shown.items() if isinstance(value, np.ndarray)}
            numbers = {name: float(value) for name, value in shown.items() if name not in images}
            self._write("write_images", steps_done, images)
            self._write("write_scalars", steps_done, numbers, writer=self.summaries)
            pictures.save(self.workdir / "pictures", steps_done, images)

    def _write(self, kind: str, *values: Any, writer: metric_writers.MetricWriter | None = None) -> None:
        try:
            getattr(writer or self.writer, kind)(*values)
        except OSError as error:
            raise UserError(
                f"the metrics of {self.workdir} could not be written ({error.strerror}); make room and "
                "run the same command again: it goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        self.end_progress()
        with contextlib.suppress(OSError):  # every write was flushed, so that one that failed has been told
            self.writer.close()


@contextlib.contextmanager
def report_only(what: str) -> Iterator[None]:
    """For what a run merely reports (images, tables): a failure within is printed in one line, and the run goes on.

    In a run of several processes it is raised: the others would wait for this one's part of a computation.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        line = " ".join(str(error).split())
        tqdm.write(  # above the bar
            f"{what} could not be made, the run goes on without: {kind}{line[:300]}{'…' * (len(line) > 300)}",
            file=sys.stderr,
        )
