"""Training, from a config to an exported result; read it from top to bottom.

devices and mesh → the job's data and model, shapes first → split by the job's trainable Variable type →
optimizer → latest checkpoint, if there is one → one jitted, donated step → the loop → export.

What a step is made of stands in training/state.py (arrays) and training/step.py (the update); where arrays live, in
sharding.py.
"""

import contextlib
import signal
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lorweb_jax import config as configs
from lorweb_jax import sharding
from lorweb_jax.training import pictures
from lorweb_jax.training.checkpoints import Checkpoints, open_run
from lorweb_jax.training.job import Job
from lorweb_jax.training.jobs import make_job
from lorweb_jax.training.optimizer import averaged, make_optimizer, make_schedule
from lorweb_jax.training.report import Report
from lorweb_jax.training.state import Layout, StateShapes, count, frozen_weights, initial_trainables
from lorweb_jax.training.step import jit_train_step, numeric


def train(config, workdir: Path) -> None:
    """Train as `config` says, going on from the newest checkpoint in `workdir`; files of the run end up there.

    Raises UserError for a config, folder or batch that cannot work, and when the loss is no longer finite.
    """
    configs.check(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, mesh)
    open_run(workdir, config)
    job = make_job(config)
    data = job.data(config)

    layout = Layout.of(job, config.seed)
    optimizer = make_optimizer(config)
    shapes = StateShapes.of(layout, optimizer, config, mesh)
    frozen = frozen_weights(job, shapes.frozen, config)
    print(f"{config.job}: {count(shapes.trainable):,} trained and {count(frozen):,} frozen parameters, "
          f"{mesh.size} device{'s' * (mesh.size > 1)}, run folder {workdir}", flush=True)

    with contextlib.ExitStack() as closing:
        closing.callback(getattr(data, "close", lambda: None))  # a grain iterator's worker processes
        checkpoints = Checkpoints(workdir)
        closing.callback(checkpoints.close)
        first_step, log_state = checkpoints.latest() or 0, []
        if first_step:
            trainable, opt_state, data_state, log_state = checkpoints.restore(
                first_step, shapes.trainable, shapes.opt_state)
            data.set_state(data_state)
            print(f"going on from step {first_step}", flush=True)
        else:
            trainable = initial_trainables(job, shapes.trainable, config)
            opt_state = jax.jit(optimizer.init, out_shardings=sharding.shardings_of(shapes.opt_state))(trainable)
        report = Report(workdir, config, first_step, log_state)
        closing.callback(report.close)
        stop = StopRequest()
        closing.callback(stop.restore)

        closing.enter_context(jax.set_mesh(mesh))
        train_step = jit_train_step(job, layout, optimizer, config.seed, mesh, shapes)
        schedule = make_schedule(config)
        every, steps = config.train, config.train.steps

        def shown_model() -> nnx.Module:
            average = averaged(opt_state)
            return layout.model(trainable if average is None else average, frozen)

        for step in range(first_step, steps):
            batch = next_batch(job, data, mesh)
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, batch, np.uint32(step))
            report.add(step, metrics)
            done = step + 1
            if done % every.log_every == 0 or done == steps:
                report.write(done, float(schedule(step)))
            if done % every.checkpoint_every == 0 or done == steps or stop.requested:
                # report.state() comes first: it refuses a loss that is not finite.
                log_state = report.state()
                checkpoints.save(done, trainable, opt_state, data.get_state(), log_state)
            if stop.requested and done < steps:
                checkpoints.finish()
                print(f"stopped by SIGTERM after step {done}, checkpoint written; "
                      "the same command goes on from there", flush=True)
                return
            if done % every.picture_every == 0 or done == steps:
                images = job.show(shown_model(), done)
                report.pictures(done, images)
                pictures.save(workdir / "pictures", done, images)
                report.restart_clock(done)
        checkpoints.finish()
        job.finish(shown_model(), workdir)
        print(f"finished at step {max(first_step, steps)}; results are in {workdir}", flush=True)


def next_batch(job: Job, data, mesh: Mesh) -> dict[str, jax.Array]:
    """The next batch on the devices, after the job's `prepare` if it has one."""
    batch = next(data)
    if hasattr(job, "prepare"):
        batch = job.prepare(batch)
    return sharding.put_batch(mesh, numeric(batch))


class StopRequest:
    """Whether SIGTERM (preemption) has come; the loop then ends after the step it is in."""

    def __init__(self):
        self.requested = False
        self.before = signal.signal(signal.SIGTERM, self._request)

    def _request(self, number, frame) -> None:
        self.requested = True

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)
