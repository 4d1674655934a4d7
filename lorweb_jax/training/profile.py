"""A profiler's trace of some training steps, for TensorBoard's Profile tab and for ui.perfetto.dev."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lorweb_jax.settings.rules import steps_of
from lorweb_jax.training.report import report_only


class Profiler:
    """Traces the steps that config.profile names, "5" or "5-7" as the log counts them, in process 0.

    The files go to `workdir`/plugins/profile, where TensorBoard looks for them beside the run's events: *.xplane.pb for
    TensorBoard, *.trace.json.gz for Perfetto.
    """

    def __init__(self, workdir: Path, steps: str):
        self.workdir, self.steps = workdir, steps_of(steps) if jax.process_index() == 0 else range(0)
        self.tracing = False

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Within it, step `number` is done (from 1): what is traced of it carries this number."""
        if number in self.steps and not self.tracing:
            with report_only("the profile"):
                jax.profiler.start_trace(self.workdir)
                self.tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, metrics: Any) -> None:
        """After step `number`: its metrics, for which the end of the last traced step waits."""
        if self.tracing and number + 1 not in self.steps:
            jax.block_until_ready(metrics)
            self.close()
            print(
                f"profile of steps up to {number} written; tensorboard --logdir {self.workdir} shows it, or "
                f"ui.perfetto.dev the .trace.json.gz in {self.workdir / 'plugins' / 'profile'}",
                flush=True,
            )

    def close(self) -> None:
        if self.tracing:
            self.tracing = False
            with report_only("the profile"):
                jax.profiler.stop_trace()
