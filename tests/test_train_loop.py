"""The training loop on a tiny job: stopped and killed runs go on exactly, bad runs end in one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import line_job
import numpy as np
import pytest
from flax import nnx

from lorweb_jax.common.errors import UserError, message_and_status
from lorweb_jax.jobs import make_job
from lorweb_jax.nn import sharding
from lorweb_jax.runs import checkpoints, checksums
from lorweb_jax.runs.checkpoints import restore_trainables
from lorweb_jax.training import loop
from lorweb_jax.training import step as steps
from lorweb_jax.training.job import Phase
from lorweb_jax.training.loop import train
from lorweb_jax.training.optimizer import make_optimizer, make_schedule, moving_average
from lorweb_jax.training.state import Partition, frozen_weights, initial_state, state_shapes
from lorweb_jax.training.step import TrainStep, make_update

LINE_JOB = str(Path(__file__).parent / "line_job.py")


def losses(workdir: Path) -> dict[int, float]:
    lines = (workdir / "log.txt").read_text().splitlines()
    return {int(line.split()[1]): float(line.split()[3]) for line in lines}


def start(workdir: Path, *options: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lorweb_jax.main", f"--config={LINE_JOB}", f"--workdir={workdir}", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def parts_of(config, job=None):
    """(job, partition, optimizer, shapes of the state) of a run on one device."""
    job, optimizer, mesh = job or line_job.make(config), make_optimizer(config), sharding.make_mesh(config.mesh)
    partition = Partition.of(job, config.seed)
    return job, partition, optimizer, state_shapes(job, partition, optimizer, config, mesh)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole")
    train(line_job.get_config(), workdir, make_job)
    return workdir


def test_training_lowers_the_loss_and_leaves_its_files(whole_run):
    curve = losses(whole_run)
    assert sorted(curve) == list(range(1, 25))
    assert np.mean([curve[step] for step in range(20, 25)]) < 0.5 * np.mean([curve[step] for step in range(1, 6)])
    assert (whole_run / "pictures/slope_000012.png").exists() and list(whole_run.glob("events*"))
    assert sorted(int(path.name) for path in (whole_run / "checkpoints").iterdir()) == [15, 20, 24]


def test_the_step_is_the_formula(whole_run):
    """Five updates by a float64 AdamW written out here; 1e-4 relative."""
    config = line_job.get_config()
    job, partition, optimizer, shapes = parts_of(config)
    slope = np.asarray(initial_state(job, partition, optimizer, config, shapes).trainable["slope"], np.float64)
    mu, nu = np.zeros_like(slope), np.zeros_like(slope)
    for step, batch in zip(range(5), job.data(config)):
        x = batch["x"].astype(np.float64)
        noise = 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), step), x.shape)
        error = x @ slope + 0.5 - (x[:, ::-1] + np.asarray(noise, np.float64))
        assert losses(whole_run)[step + 1] == pytest.approx(np.square(error).mean(), rel=1e-4)
        gradient = 2 * x.T @ error / error.size
        gradient *= min(1.0, 1.0 / np.linalg.norm(gradient))
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.99 * nu + 0.01 * gradient**2
        unbiased = mu / (1 - 0.9 ** (step + 1)), nu / (1 - 0.99 ** (step + 1))
        slope -= 0.05 * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + 0.05 * slope)


def test_only_trainables_reach_optimizer_and_checkpoint_and_frozen_are_arguments(whole_run):
    held, config = restore_trainables(whole_run)
    assert held.keys() == {"slope"} and config.seed == 3
    np.testing.assert_array_equal(held["slope"], np.load(whole_run / "slope.npy"))

    config = line_job.get_config()
    job, partition, optimizer, shapes = parts_of(config)
    state = initial_state(job, partition, optimizer, config, shapes)
    frozen_shapes = partition.frozen_shapes(sharding.make_mesh(config.mesh), config.train.param_dtype)
    frozen = frozen_weights(job, frozen_shapes, config)
    np.testing.assert_array_equal(frozen["frozen.a.b"], 0.5)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (4, 4)}
    step = jax.make_jaxpr(make_update(job, partition, optimizer, config))(state, frozen, {"x": jnp.zeros((8, 4))})
    assert all(np.size(constant) <= 1 for constant in step.consts)


def test_a_run_killed_at_three_moments_is_the_whole_run_to_the_bit(whole_run, tmp_path):
    workdir = tmp_path / "run"

    def kill_when(ready) -> None:
        run = start(workdir, "--config.line.pause=0.02")
        for line in run.stdout:
            if ready(int((re.match(r"step (\d+)", line) or [0, 0])[1])):
                break
        run.kill()
        assert run.wait() == -signal.SIGKILL

    def writing(step: int) -> bool:
        """In the middle of the checkpoint of step 10 or later: it has a temporary name still."""
        end = time.monotonic() + 0.5
        while step >= 10 and time.monotonic() < end:
            if any("tmp" in path.name for path in (workdir / "checkpoints").iterdir()):
                return True
        return False

    kill_when(lambda step: step == 3)  # before the first checkpoint
    kill_when(writing)
    kill_when(lambda step: step == 18)  # between two checkpoints
    last = start(workdir, "--config.line.pause=0.02")
    output, errors = last.communicate()
    assert last.returncode == 0, errors
    assert re.search(r"going on from step 1[05]", output)
    assert (workdir / "log.txt").read_bytes() == (whole_run / "log.txt").read_bytes()
    np.testing.assert_array_equal(np.load(workdir / "slope.npy"), np.load(whole_run / "slope.npy"))


def test_sigterm_writes_a_checkpoint_and_the_run_goes_on_exactly(tmp_path, monkeypatch):
    config = line_job.get_config("average")
    config.train.log_every = 4  # step 7, where it is stopped, is within an interval of the log
    config.train.checkpoint_every = 50
    train(config, tmp_path / "whole", make_job)

    def next_batch(self):
        if self.position == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self)

    real = line_job.Points.__next__
    with monkeypatch.context() as patch:
        patch.setattr(line_job.Points, "__next__", next_batch)
        train(config, tmp_path / "run", make_job)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["7"]
    assert not (tmp_path / "run/slope.npy").exists()
    train(config, tmp_path / "run", make_job)
    assert (tmp_path / "run/log.txt").read_bytes() == (tmp_path / "whole/log.txt").read_bytes()
    # The averaged weights are what is exported and restored.
    exported = np.load(tmp_path / "run/slope.npy")
    np.testing.assert_array_equal(exported, np.load(tmp_path / "whole/slope.npy"))
    np.testing.assert_array_equal(exported, restore_trainables(tmp_path / "run")[0]["slope"])


def test_sigterm_in_the_middle_of_a_checkpoint_loses_nothing(whole_run, tmp_path, monkeypatch):
    """Two of them, while the thread that saves is at it: the run stops soon, and goes on to the bit."""
    real, sent = checksums.write, []

    def write(folder):
        if len(sent) < 2:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        real(folder)

    monkeypatch.setattr(checksums, "write", write)
    assert not train(line_job.get_config(), tmp_path, make_job)
    assert checksums.damage(tmp_path / "checkpoints" / str(max(checkpoints.complete_steps(tmp_path)))) is None
    for _ in range(2):
        if train(line_job.get_config(), tmp_path, make_job):
            break
    assert (tmp_path / "log.txt").read_bytes() == (whole_run / "log.txt").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "slope.npy"), np.load(whole_run / "slope.npy"))


@pytest.mark.parametrize("gone", ["checkpoints", "."])
def test_a_folder_that_vanishes_while_a_run_writes_it(tmp_path, monkeypatch, gone):
    def next_batch(self):
        if self.position == 7:
            # Moved in one step: deleting it one by one would race with a checkpoint that is being written.
            there = (tmp_path / "run" / gone).resolve()
            there.rename(tmp_path / "away")
            there.touch()  # a file in its place
        return real(self)

    real = line_job.Points.__next__
    monkeypatch.setattr(line_job.Points, "__next__", next_batch)
    with pytest.raises((UserError, OSError)) as caught:
        train(line_job.get_config(), tmp_path / "run", make_job)
    message, status = message_and_status(caught.value)
    assert status == 1 and str(tmp_path / "run") in message and "\n" not in message


def test_averaged_weights_are_the_formula():
    """By the update and by numpy: four steps, of which each averages the weights after it."""
    config = line_job.get_config("average")
    job, partition, optimizer, shapes = parts_of(config)
    update = jax.jit(make_update(job, partition, optimizer, config))
    state = initial_state(job, partition, optimizer, config, shapes)
    average = np.asarray(state.trainable["slope"], np.float64)
    for step, batch in zip(range(4), job.data(config)):
        state, _ = update(state, {"frozen.a.b": jnp.zeros(4)}, {"x": batch["x"]})
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(state.trainable["slope"])
    np.testing.assert_allclose(state.average["slope"], average, rtol=1e-5)
    late = moving_average({"w": jnp.array([1.0])}, {"w": jnp.array([2.0])}, jnp.uint32(500), 0.9)
    np.testing.assert_allclose(late["w"], [1.1], rtol=1e-6)


class Two(nnx.Module):
    """A slope and a shift, each trained in a phase of its own."""

    def __init__(self, rngs):
        self.slope = line_job.Slope(jax.random.normal(rngs.params(), (4,)))
        self.shift = line_job.Slope(jnp.zeros(4))


class TwoPhases(line_job.LineJob):
    def __init__(self, start: int, joint: bool):
        self.start, self.joint = start, joint

    def build(self, rngs):
        return Two(rngs)

    def frozen(self, shapes):
        return None

    def phases(self):
        """The slope by the squares of the errors, then the shift by how it stands with the slope that came of it."""

        def squares(model, batch, key):
            return jnp.square(model.slope[...] * batch["x"] + model.shift[...] - 1).sum(), {}

        def product(model, batch, key):
            return (model.slope[...] * model.shift[...]).sum(), {"largest": model.shift[...].max()}

        return [
            Phase("first", squares, nnx.PathContains("slope")),
            Phase("second", product, nnx.PathContains("shift"), self.start),
        ]


@pytest.mark.parametrize("start, joint", [(0, False), (2, False), (1, True)])
def test_phases_follow_one_another_each_with_an_optimizer_of_its_own(tmp_path, start, joint):
    """Four steps by a float64 AdamW written out here: the second phase's gradient is the slope after the first's
    update, clipped by itself; or, jointly, before it, both clipped together. A phase that begins later begins its
    moments and its count then. 1e-5 relative; and a whole run, with its log and checkpoint."""
    config = line_job.get_config()
    config.train.steps = config.train.checkpoint_every = 4
    job, partition, optimizer, shapes = parts_of(config, TwoPhases(start, joint))
    assert shapes.optimizer.keys() == {"first", "second"}
    state = initial_state(job, partition, optimizer, config, shapes)
    values = {name: np.asarray(array, np.float64) for name, array in state.trainable.items()}
    moments = {name: [np.zeros(4), np.zeros(4)] for name in values}
    for step, batch in zip(range(4), job.data(config)):
        x = batch["x"].astype(np.float64)
        names = ("slope", "shift")[: 1 + (step >= start)]
        before = dict(values)

        def gradient(name, point, x=x):
            error = point["slope"] * x + point["shift"] - 1
            return (2 * error * x).sum(0) if name == "slope" else point["slope"].copy()

        norm = np.linalg.norm([gradient(name, before) for name in names])
        for name in names:
            own = gradient(name, before if joint else values)
            own *= min(1.0, 1.0 / (norm if joint else np.linalg.norm(own)))
            count, (m, v) = step + 1 - start * (name == "shift"), moments[name]
            moments[name] = m, v = [0.9 * m + 0.1 * own, 0.99 * v + 0.01 * own**2]
            direction = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.99**count)) + 1e-8)
            values[name] = values[name] - 0.05 * (direction + 0.05 * values[name])
    train(config, tmp_path, lambda config: job)
    restored = restore_trainables(tmp_path)[0]
    for name, value in values.items():
        np.testing.assert_allclose(restored[name], value, rtol=1e-5, err_msg=name)
    lines = [set(line.split()) for line in (tmp_path / "log.txt").read_text().splitlines()]
    for step, line in enumerate(lines):
        assert {"loss", "first/loss"} <= line and ("gradient_norm" in line) == joint
        assert {"second/loss", "second/largest", "second/gradient_norm"} & line == (
            {"second/loss", "second/largest", "second/gradient_norm"} if step >= start else set()
        )


def test_a_run_whose_second_phase_begins_within_an_interval_of_the_log_goes_on_exactly(tmp_path, monkeypatch):
    """Broken off before the phase begins and after it; its metrics are means over the steps that it ran in."""
    config = line_job.get_config()
    config.train.steps, config.train.log_every, config.train.checkpoint_every = 6, 3, 2
    job = TwoPhases(2, False)
    train(config, tmp_path / "whole", lambda config: job)
    real = line_job.Points.__next__
    for last in (3, 5):

        def next_batch(self, last=last):
            if self.position == last:
                raise KeyboardInterrupt
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(line_job.Points, "__next__", next_batch)
            with pytest.raises(KeyboardInterrupt):
                train(config, tmp_path / "run", lambda config: job)
    assert train(config, tmp_path / "run", lambda config: job)
    assert (tmp_path / "run/log.txt").read_bytes() == (tmp_path / "whole/log.txt").read_bytes()
    whole, resumed = (restore_trainables(tmp_path / name)[0] for name in ("whole", "run"))
    for name in whole:
        np.testing.assert_array_equal(resumed[name], whole[name])


def test_no_phase_in_the_first_step_is_refused(tmp_path):
    job = TwoPhases(1, False)
    later = [Phase("late", job.loss, start=1)]
    job.phases = lambda: later
    with pytest.raises(UserError, match="no phase of the job runs in step 0"):
        train(line_job.get_config(), tmp_path, lambda config: job)


class Encoded(line_job.LineJob):
    """The line's loss, of what `encode` makes of each micro-batch."""

    def encode(self, model, batch):
        assert batch["x"].shape == (2, 4)
        return {"x": batch["x"] * 2}


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    """Two updates of four micro-batches by a float64 AdamW written out here, each with a key of its own; 1e-4
    relative."""
    config = line_job.get_config()
    config.train.accumulate = 4
    job, partition, optimizer, shapes = parts_of(config, Encoded())
    step = TrainStep(job, partition, optimizer, config, sharding.make_mesh(config.mesh), shapes)
    state = initial_state(job, partition, optimizer, config, shapes)
    slope = np.asarray(state.trainable["slope"], np.float64)
    mu, nu = np.zeros_like(slope), np.zeros_like(slope)
    frozen = {"frozen.a.b": jnp.full(4, 0.5)}
    for number, batch in zip(range(2), job.data(config)):
        x = 2 * batch["x"].astype(np.float64)
        losses, gradients = [], []
        for part in range(4):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), part)
            own = x[part::4]
            noise = np.asarray(0.1 * jax.random.normal(key, own.shape), np.float64)
            error = own @ slope + 0.5 - (own[:, ::-1] + noise)
            losses.append(np.square(error).mean())
            gradients.append(2 * own.T @ error / error.size)
        gradient = np.mean(gradients, axis=0)
        norm = np.linalg.norm(gradient)
        state, metrics = step(number, state, frozen, {"x": jnp.asarray(batch["x"])})
        assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-4)
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-4)
        gradient *= min(1.0, 1.0 / norm)
        mu, nu = 0.9 * mu + 0.1 * gradient, 0.99 * nu + 0.01 * gradient**2
        unbiased = mu / (1 - 0.9 ** (number + 1)), nu / (1 - 0.99 ** (number + 1))
        slope -= 0.05 * (unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8) + 0.05 * slope)
        np.testing.assert_allclose(state.trainable["slope"], slope, rtol=1e-4)


def test_micro_batches_that_do_not_divide_are_refused(tmp_path):
    config = line_job.get_config()
    config.train.accumulate = 3
    with pytest.raises(
        UserError, match="train.accumulate is 3; it must be a divisor of config.train.batch, which is 8"
    ):
        train(config, tmp_path, make_job)
    mesh = SimpleNamespace(shape={"data": 2, "fsdp": 1})
    with pytest.raises(UserError, match="8, in 8 micro-batches, does not divide over 2 devices.*a multiple of 16"):
        sharding.check_batch(8, mesh, 8)


def test_schedules():
    config = line_job.get_config()
    assert float(make_schedule(config)(0)) == float(make_schedule(config)(20)) == pytest.approx(0.05)
    config.optimizer.warmup = 4
    np.testing.assert_allclose([make_schedule(config)(i) for i in (0, 2, 4, 9)], [0, 0.025, 0.05, 0.05], rtol=1e-6)
    config.optimizer.schedule = "cosine"
    np.testing.assert_allclose([make_schedule(config)(i) for i in (0, 4, 14, 24)], [0, 0.05, 0.025, 0], atol=1e-8)


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, log_every):
    config = line_job.get_config()
    config.train.log_every = log_every
    config.line.bad_step = 11  # the 12th step
    with pytest.raises(UserError, match="the loss is nan at step 12"):
        train(config, tmp_path, make_job)
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == 10
    assert np.isfinite(restore_trainables(tmp_path)[0]["slope"]).all()


def test_pictures_that_fail_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    def log_images(self, model, step):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(line_job.LineJob, "log_images", log_images)
    config = line_job.get_config()
    config.train.steps = config.train.log_images_every = 2
    assert train(config, tmp_path, make_job) and (tmp_path / "slope.npy").exists()
    assert capsys.readouterr().err == (
        "pictures of step 2 could not be made, the run goes on without: RuntimeError: "
        "RESOURCE_EXHAUSTED: out of memory\n"
    )


def test_a_run_folder_of_another_config_is_refused(whole_run):
    config = line_job.get_config()
    config.optimizer.b2 = 0.5
    with pytest.raises(UserError, match="optimizer.b2 was 0.99 and is 0.5"):
        train(config, whole_run, make_job)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        train(line_job.get_config(), tmp_path / "file" / "run", make_job)


def test_a_disk_that_is_full_when_a_checkpoint_is_due(tmp_path, monkeypatch):
    config = line_job.get_config()
    saves = iter([1e9, 100])
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=next(saves)))
    with pytest.raises(UserError, match="could not be written.*MB are free.*goes on from step 5"):
        train(config, tmp_path, make_job)
    assert restore_trainables(tmp_path, step=5)[0].keys() == {"slope"}


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tmp_path):
    """A limit on the size of files, set before the third save, stands in for the disk."""
    command = (
        "import resource, lorweb_jax.main as m, lorweb_jax.runs.checkpoints as c;"
        "from lorweb_jax.common.errors import run_command; real = c.Checkpoints.save;"
        "limit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size));"
        "c.Checkpoints.save = lambda self, step, *a: (step == 15 and limit(64), real(self, step, *a));"
        "run_command(m.command)"
    )
    run = subprocess.run(
        [sys.executable, "-c", command, f"--config={LINE_JOB}", f"--workdir={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert re.search("^error: .*could not be written.*File too large", run.stderr, re.MULTILINE), run.stderr
    assert checkpoints.Checkpoints(tmp_path / "run").latest() in (5, 10)


def test_eight_devices_train_as_one(whole_run, tmp_path):
    """Losses of a batch split over 8 forced CPU devices; 1e-5 relative."""
    run = start(tmp_path / "run", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    output, errors = run.communicate()
    assert run.returncode == 0 and "8 devices" in output, errors
    command = f"python -m lorweb_jax.main --config={LINE_JOB} --workdir={tmp_path / 'run'}\n"
    assert (tmp_path / "run" / "command.txt").read_text() == command
    one, eight = losses(whole_run), losses(tmp_path / "run")
    np.testing.assert_allclose([eight[step] for step in one], list(one.values()), rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_devices(tmp_path):
    run = start(tmp_path / "run", "--config.train.batch=6", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    _, errors = run.communicate()
    assert run.returncode == 2
    assert errors.splitlines()[-1].startswith("error: a batch of 6 does not divide over 4 devices")
    assert not (tmp_path / "run").exists()


def test_the_step_s_compiler_is_told_what_suits_the_devices(tmp_path, monkeypatch, capsys):
    """An option that there is none of ends in the compiler's complaint."""
    for module in (loop, steps):
        monkeypatch.setattr(module, "step_options", lambda mesh: {"xla_no_such_option": True})
    with pytest.raises(Exception, match="No such compile option: 'xla_no_such_option'"):
        train(line_job.get_config(), tmp_path / "run", make_job)
    assert "told the step's compiler: xla_no_such_option=True" in capsys.readouterr().out


def test_a_mesh_of_more_devices_than_there_are():
    with pytest.raises(UserError, match="data 3 × fsdp 1 × sequence 1 × tensor 1 needs 3 devices, but 1 were found"):
        sharding.make_mesh({"data": 3})
