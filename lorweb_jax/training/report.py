"""What a run reports: metrics and pictures through clu's metric writers (writers.py), and progress on stdout."""

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.images import pictures
from lorweb_jax.training.writers import LOG, SummaryWriter, TextWriter, TrackerWriter, metric_writers


class Report:
    """Collects each step's metrics, and every `log_every` steps writes their means and a line of progress.

    Metrics stay on the device until then: no step waits for another's loss.
    """

    def __init__(
        self,
        workdir: Path,
        config,
        first_step: int,
        log_state: list[dict[str, float]],
        trackers: Sequence[TrackerWriter] = (),
    ):
        """trackers: of `tracked`, which ends them."""
        self.workdir, self.trackers = workdir, trackers
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
        """Images uint8 [h, w, 3] by name into workdir/pictures, and images and numbers into all writers but the log."""
        if self.writes:
            images = {name: value for name, value in shown.items() if isinstance(value, np.ndarray)}
            numbers = {name: float(value) for name, value in shown.items() if name not in images}
            self._write("write_images", steps_done, images)
            self._write("write_scalars", steps_done, numbers, writer=self.summaries)
            pictures.save(self.workdir / "pictures", steps_done, images)

    def _write(
        self, kind: str, step: int, values: Mapping[str, Any], writer: metric_writers.MetricWriter | None = None
    ) -> None:
        """writer: in the place of log and TensorBoard. What a tracker doesn't take is said, and left out."""
        try:
            getattr(writer or self.writer, kind)(step, values)
        except OSError as error:
            raise UserError(
                f"the metrics of {self.workdir} could not be written ({error.strerror}); make room and "
                "run the same command again: it goes on from the last checkpoint"
            ) from error
        for tracker in self.trackers if values else ():
            with report_only(f"what {tracker.name} shows of step {step}", alone=True):
                getattr(tracker, kind)(step, values)

    def close(self) -> None:
        self.end_progress()
        with contextlib.suppress(OSError):  # every write was flushed, so that one that failed has been told
            self.writer.close()


@contextlib.contextmanager
def tracked(config, workdir: Path) -> Iterator[list[TrackerWriter]]:
    """Within it the runs of `config.trackers` are open, in process 0; an error that leaves it makes them failed ones.

    Raises UserError where a tracker can't begin.
    """
    trackers: list[TrackerWriter] = []
    failed = True
    try:
        for name in config.trackers if jax.process_index() == 0 else ():
            trackers.append(TrackerWriter(name, workdir, config))
        yield trackers
        failed = False
    finally:
        for tracker in trackers:
            with report_only(f"the end of the run in {tracker.name}", alone=True):
                tracker.close(failed)


@contextlib.contextmanager
def report_only(what: str, alone: bool = False) -> Iterator[None]:
    """For what a run merely reports (images, tables): a failure within is printed in one line, and the run goes on.

    In a run of several processes it is raised, unless this one does it alone: the others would wait for its part.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and not alone:
            raise
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        line = " ".join(str(error).split())
        tqdm.write(  # above the bar
            f"{what} could not be made, the run goes on without: {kind}{line[:300]}{'…' * (len(line) > 300)}",
            file=sys.stderr,
        )
