"""What a run records of itself: a profiler's trace of some steps, and compiled programs for the next start."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import jax
import line_job
import pytest
from jax import monitoring

from configs.basis import get_config as basis_config
from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import make_job
from lorweb_jax.nn import sharding
from lorweb_jax.settings.config import check
from lorweb_jax.settings.rules import Steps, steps_of
from lorweb_jax.training.compile_cache import FOLDER
from lorweb_jax.training.loop import train
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import Partition, state_shapes
from lorweb_jax.training.step import TrainStep

LINE_JOB = str(Path(__file__).parent / "line_job.py")


def config_of(**train):
    config = line_job.get_config("average")
    config.train.update(steps=6, log_every=6, checkpoint_every=6, log_images_every=6, **train)
    return config


def test_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    """In the form that Perfetto opens, and in TensorBoard's. In a process of its own: where the TPU compiler of the
    plan's tests is loaded, jax's profiler crashes."""
    options = ["--config.profile=3-4", *(f"--config.train.{name}=6" for name in ("steps", "log_every"))]
    command = [sys.executable, "-m", "lorweb_jax.main", f"--config={LINE_JOB}", f"--workdir={tmp_path}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "profile of steps up to 4 written; tensorboard --logdir" in done.stdout
    [folder] = (tmp_path / "plugins" / "profile").iterdir()
    [trace] = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "train"} == {"3", "4"}
    [protocol_buffer] = folder.glob("*.xplane.pb")
    names = {
        event.name
        for plane in jax.profiler.ProfileData.from_file(str(protocol_buffer)).planes
        for line in plane.lines
        for event in line.events
    }
    assert "train" in names


def test_parts_of_a_step_have_names():
    """In the compiled program's metadata, which the profiler shows beside each operation."""
    config = config_of()
    job, optimizer, mesh = line_job.make(config), make_optimizer(config), sharding.make_mesh(config.mesh)
    partition = Partition.of(job, config.seed)
    shapes = state_shapes(job, partition, optimizer, config, mesh)
    step = TrainStep(job, partition, optimizer, config, mesh, shapes)
    batch = {"x": jax.ShapeDtypeStruct((8, 4), "float32")}
    text = step.update().lower(shapes, partition.frozen_shapes(mesh, "float32"), batch).compile().as_text()
    for name in ("train/jvp(loss)", "train/optimizer", "average"):
        assert f"/{name}/" in text, name


@pytest.fixture
def cache_events(monkeypatch):
    """Counts of jax's events of its compilation cache, which takes programs of any size meanwhile."""
    counts, earlier = {}, jax.config.jax_persistent_cache_min_compile_time_secs

    def count(event, **kwargs):
        counts[event.rpartition("/")[2]] = counts.get(event.rpartition("/")[2], 0) + 1

    monitoring.register_event_listener(count)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield counts
    jax.config.update("jax_persistent_cache_min_compile_time_secs", earlier)
    monitoring.unregister_event_listener(count)


def test_a_second_start_takes_compiled_programs_from_the_first(tmp_path, cache_events):
    """Another run beside it, of the same config: nothing is compiled. And a damaged cache is made anew."""

    def start(name):
        jax.clear_caches()
        cache_events.clear()
        train(config_of(), tmp_path / name, make_job)
        return cache_events.get("cache_hits", 0), cache_events.get("cache_misses", 0)

    hits, misses = start("first")
    assert hits == 0 and misses > 3
    assert len(list((tmp_path / FOLDER).glob("*-cache"))) == misses
    assert start("second") == (misses, 0)
    assert (tmp_path / "first/log.txt").read_bytes() == (tmp_path / "second/log.txt").read_bytes()
    for file in (tmp_path / FOLDER).glob("jit_update-*-cache"):
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
        start("third")
    assert (tmp_path / "first/log.txt").read_bytes() == (tmp_path / "third/log.txt").read_bytes()
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_is_turned_off_or_somewhere_else(tmp_path, cache_events, monkeypatch):
    config = config_of()
    config.compile_cache = False
    train(config, tmp_path / "off" / "run", make_job)
    assert [path.name for path in (tmp_path / "off").iterdir()] == ["run"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "of the user"))
    try:
        train(config_of(), tmp_path / "on" / "run", make_job)
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
    assert [path.name for path in (tmp_path / "on").iterdir()] == ["run"]


def test_steps_of_a_profile():
    rule = Steps()
    assert [list(steps_of(text)) for text in ("", "5", "5-7")] == [[], [5], [5, 6, 7]]
    for text in ("0", "5-", "-5", "7-5", "a", "5-7-9", "05", "5:7", " 5", "٥", 5, None):
        assert not rule.takes(text), text


def test_a_profile_of_steps_that_never_come_is_refused():
    config = basis_config()
    config.profile, config.train.steps = "3-7", 5
    config.optimizer.warmup = 0
    with pytest.raises(UserError, match="config.profile is '3-7'; it must be of steps up to config.train.steps, .* 5"):
        check(config)
