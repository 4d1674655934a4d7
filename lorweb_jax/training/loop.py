"""Training, from a config to an exported result; read it from top to bottom.

mesh → job and data → model as shapes, partitioned into trainable and frozen → optimizer → frozen weights → newest
checkpoint or fresh trainables → a jitted step with donated state → loop → export.

training/state.py has the arrays, training/step.py the update, nn/sharding.py how arrays are sharded. In a run of
several processes each of them executes this: it feeds its rows of the batch, and all do the same steps, log and finish
in the same order; process 0 alone writes what is not a checkpoint.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lorweb_jax.nn import sharding
from lorweb_jax.nn.quantization import bytes_by_dtype
from lorweb_jax.processes.compiler_flags import step_options
from lorweb_jax.processes.stop import StopRequest
from lorweb_jax.runs.checkpoints import Checkpoints, goes_on
from lorweb_jax.runs.folder import open_run, owned
from lorweb_jax.runs.outcome import recorded
from lorweb_jax.settings import config as configs
from lorweb_jax.training.best import mark_best
from lorweb_jax.training.compile_cache import FOLDER, compile_cache
from lorweb_jax.training.job import Job
from lorweb_jax.training.optimizer import make_optimizer, make_schedule
from lorweb_jax.training.profile import Profiler
from lorweb_jax.training.report import Report, report_only, tracked
from lorweb_jax.training.state import Partition, count, frozen_weights, initial_state, state_shapes
from lorweb_jax.training.step import TrainStep, numeric
from lorweb_jax.training.writers import require_trackers


def train(config, workdir: Path, make_job: Callable[[ConfigDict], Job], command: str = "") -> bool:
    """Train the job that `make_job` makes of `config`, from the newest checkpoint in `workdir`, where all files go.

    command: the command line of the run, kept in its folder. Returns whether the run came to its end; False where
    SIGTERM stopped it. Raises UserError for a config, folder or batch that cannot work, and when the loss is no longer
    finite.
    """
    configs.check(config)
    require_trackers(config.trackers)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, mesh, config.train.accumulate)
    with contextlib.ExitStack() as closing:
        if config.compile_cache:
            closing.enter_context(compile_cache(workdir.parent / FOLDER))
        stop = StopRequest(lambda: goes_on(workdir))
        closing.callback(stop.close)
        closing.enter_context(owned(workdir))
        job = make_job(config)
        for heads in job.attention_heads:
            sharding.check_heads(heads, mesh)
        sharding.check_tokens(job.sequences, mesh)
        open_run(workdir, config, job.sources(), command)
        outcome = closing.enter_context(recorded(workdir))
        trackers = closing.enter_context(tracked(config, workdir))
        data = job.data(config)
        closing.callback(data.close)

        partition, optimizer = Partition.of(job, config.seed), make_optimizer(config)
        shapes = state_shapes(job, partition, optimizer, config, mesh)
        frozen = frozen_weights(job, partition.frozen_shapes(mesh, config.train.param_dtype), config)
        partition, frozen = partition.unstacked(job, frozen)
        hosts = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(
            f"{config.job}: {count(shapes.trainable):,} trained and {count(frozen | shapes.constants):,} frozen "
            f"parameters, {mesh.size} device{'s' * (mesh.size > 1)}{hosts}, run folder {workdir}\n"
            f"frozen weights: {bytes_by_dtype(frozen)}; "
            f"optimizer: {bytes_by_dtype((shapes.optimizer, shapes.average))}",
            flush=True,
        )

        if options := step_options(mesh):
            told = ", ".join(f"{name}={options[name]}" for name in options)
            print(f"told the step's compiler: {told} (what LIBTPU_INIT_ARGS says of these wins)", flush=True)

        checkpoints = Checkpoints(workdir)
        closing.callback(checkpoints.close)
        restored = checkpoints.restore_newest(shapes)
        if restored:
            first_step, state, data_state, log_state = restored
            data.set_state(data_state)
            print(f"going on from step {first_step}", flush=True)
        else:
            first_step, log_state = 0, []
            state = initial_state(job, partition, optimizer, config, shapes)
        report = Report(workdir, config, first_step, log_state, trackers)
        closing.callback(report.close)
        profiler = Profiler(workdir, config.profile)
        closing.callback(profiler.close)

        closing.enter_context(jax.set_mesh(mesh))
        train_step = TrainStep(job, partition, optimizer, config, mesh, shapes)
        schedule = make_schedule(config)
        every, steps = config.train, config.train.steps

        for step in range(first_step, steps):
            done = step + 1
            with profiler.step(done):
                batch = next_batch(job, data, config.train.batch, mesh)
                state, metrics = train_step(step, state, frozen, batch)
            profiler.after(done, metrics)
            report.add(step, metrics)
            stopping = stop.after(done)
            if done % every.log_every == 0 or done == steps:
                report.write(done, float(schedule(step)))
            if done % every.checkpoint_every == 0 or done == steps or stopping:
                # report.state() comes first: it refuses a loss that is not finite.
                log_state = report.state()
                checkpoints.save(done, state, data.get_state(), log_state)
            if stopping and done < steps:
                checkpoints.finish()
                report.end_progress()
                print(
                    f"stopped by SIGTERM after step {done}, checkpoint written; the same command goes on from there",
                    flush=True,
                )
                return False
            if done % every.checkpoint_every == 0 or done == steps:
                with report_only(f"the held-out score of step {done}"):
                    score = mark_best(workdir, job, partition.model(state.exported, frozen), done)
                    if score is not None:
                        report.log_images(done, {"held_out_score": score})
                        report.restart_clock()
            if done % every.log_images_every == 0 or done == steps:
                with report_only(f"pictures of step {done}"):
                    report.log_images(done, job.log_images(partition.model(state.exported, frozen), done))
                report.restart_clock()
        checkpoints.finish()
        stop.saved()
        with own_folder(workdir) as folder:
            job.finish(partition.model(state.exported, frozen), folder)
        outcome["state"] = "finished"
        print(f"finished at step {steps}; results are in {workdir}", flush=True)
    return True


@contextlib.contextmanager
def own_folder(workdir: Path) -> Iterator[Path]:
    """Where this process may write files: the run folder in process 0, a temporary folder in others."""
    if jax.process_index() == 0:
        yield workdir
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


def next_batch(job: Job, data, size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The next batch on the devices, after the job's `prepare`.

    A job may give all `size` rows of the batch, or only those that this process's devices hold.
    """
    batch, rows = next(data), sharding.batch_rows(mesh, size)
    if any(len(value) > len(rows) for value in batch.values()):
        batch = {name: np.asarray(value)[rows] for name, value in batch.items()}
    return sharding.put_batch(mesh, numeric(job.prepare(batch)))
