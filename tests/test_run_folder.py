"""A run's folder: one run at a time, nothing of others replaced, the same config and the same files."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import jax
import line_job
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import make_job
from lorweb_jax.nn import sharding
from lorweb_jax.runs import folder as run_folder
from lorweb_jax.runs.folder import open_run, owned
from lorweb_jax.settings import config as configs
from lorweb_jax.training.loop import train

HOLDER = """
import fcntl, json, os, socket, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": "2026-01-02 03:04:05"}))
lock.flush()
print("held", flush=True)
time.sleep(60)
"""


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_folder_belongs_to_one_run_and_is_free_once_that_is_dead(tmp_path):
    """Host and process are named, nothing in the folder changes; after kill -9 the next one has it."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "log.txt").write_text("step 1  loss 1\n")
    configs.save(line_job.get_config(), workdir / "config.json")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(workdir / ".lock")], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    before = files_in(workdir)
    with pytest.raises(
        UserError,
        match=rf"belongs to a run that is still at it \(process {holder.pid} on "
        rf"{socket.gethostname()}, since 2026-01-02 03:04:05\)",
    ):
        train(line_job.get_config(), workdir, make_job)
    assert files_in(workdir) == before
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    with owned(workdir):
        assert json.loads((workdir / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), owned(workdir):
            pass
    with owned(workdir):  # given back
        pass


def test_a_start_that_is_refused_leaves_nothing(tmp_path, monkeypatch):
    """Data that can't be used; axes that don't divide heads or tokens, which is told before weights are read."""

    def refused(config):
        raise UserError("no data")

    class TwoHeads(line_job.LineJob):
        attention_heads, sequences = (4, 3), (8, 7)

        def frozen(self, shapes):
            raise AssertionError("weights were read")

    with pytest.raises(UserError, match="no data"):
        train(line_job.get_config(), tmp_path / "runs" / "a", refused)
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    for sizes, message in (
        ((1, 1, 1, 2), r"3 attention heads do not divide over 2 devices \(tensor 2 × sequence 1\)"),
        ((1, 1, 3, 1), r"4 attention heads do not divide over 3 devices"),
    ):
        mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
        monkeypatch.setattr(sharding, "make_mesh", lambda sizes, mesh=mesh: mesh)
        with pytest.raises(UserError, match=message) as caught:
            train(line_job.get_config(), tmp_path / "there", lambda config: TwoHeads())
        assert caught.value.code == 2 and not list((tmp_path / "there").iterdir())
    TwoHeads.attention_heads = (3,)
    with pytest.raises(UserError, match="8 tokens do not divide over a sequence axis of 3"):
        train(line_job.get_config(), tmp_path / "there", lambda config: TwoHeads())


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_reader_does_not_keep_the_lock(tmp_path):
    """It would hold it beyond the run's death."""
    with owned(tmp_path):
        child = os.fork()
        if not child:
            links = [
                os.readlink(f"/proc/self/fd/{number}")
                for number in os.listdir("/proc/self/fd")
                if os.path.lexists(f"/proc/self/fd/{number}")
            ]
            os._exit(str(tmp_path / ".lock") in links)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize(
    "content, free",
    [
        ({"host": socket.gethostname(), "pid": 2**22 + 5}, True),
        ({"host": socket.gethostname(), "pid": 2**70}, True),
        ({"host": "elsewhere", "pid": 1}, False),
        ({"host": socket.gethostname(), "pid": os.getppid()}, False),
        ("nonsense", True),
        ("[" * 10**5, True),
        ("\xff\0", True),
    ],
)
def test_where_the_file_system_knows_no_locks_the_owner_in_the_file_counts(tmp_path, monkeypatch, content, free):
    def flock(file, kind):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)  # which filelock calls
    (tmp_path / ".lock").write_text(content if isinstance(content, str) else json.dumps(content | {"since": "then"}))
    if free:
        with owned(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="still at it"), owned(tmp_path):
            pass


@pytest.mark.parametrize("name", ["log.txt", "checkpoints", "export", "vae", "events.out.tfevents.1", "config.json"])
def test_what_no_run_wrote_is_not_replaced(tmp_path, name):
    """A model's folder, somebody's log: the run would write files of these names."""
    (tmp_path / name).write_text('{"hidden_size": 7}')
    with pytest.raises(UserError, match=name):
        train(line_job.get_config(), tmp_path, make_job)
    assert (tmp_path / name).read_text() == '{"hidden_size": 7}'


def test_other_files_are_no_hindrance(tmp_path):
    for name in ("stdout.txt", "notes.md", ".DS_Store"):
        (tmp_path / name).touch()
    with owned(tmp_path):
        open_run(tmp_path, line_job.get_config(), {})


def test_a_folder_without_checkpoints_takes_another_config(tmp_path):
    config = line_job.get_config()
    open_run(tmp_path, config, {})
    config.seed = 4
    open_run(tmp_path, config, {})
    assert configs.load(tmp_path / "config.json").seed == 4


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """(a run folder with checkpoints of a basis, its config, what lies at the config's paths)."""
    from configs import basis

    config = basis.smoke()
    config.data.root, config.pipeline = "old/data", "old/pipeline"
    sources = {"pipeline": "p", "basis.encoder": "e", "data.root": "d", "data.held_out": ""}
    open_run(tmp_path, config, sources)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    monkeypatch.setattr(run_folder, "complete_steps", lambda workdir: [4])
    return tmp_path, config, sources


def test_a_moved_run_goes_on_with_the_same_files_elsewhere(moved):
    workdir, config, sources = moved
    config.data.root, config.pipeline, config.basis.encoder = "/new/data", "/new/pipeline", "/new/encoder"
    config.data.cache, config.precomputed = "/new/cache", "/new/precomputed"
    open_run(workdir, config, sources)
    assert configs.load(workdir / "config.json").data.root == "/new/data"


def test_evaluation_may_change_and_training_may_not(moved):
    workdir, config, sources = moved
    config.evaluation.steps, config.train.log_images_every, config.profile = 3, 7, "5-7"
    open_run(workdir, config, sources)
    assert configs.load(workdir / "config.json").evaluation.steps == 3
    config.train.ema = 0.5
    with pytest.raises(UserError, match=r"another config: train.ema was 0.0 and is 0.5; use"):
        open_run(workdir, config, sources)


def test_a_run_from_before_a_field_was_added_goes_on_as_it_was(moved):
    """Its config.json lacks the field."""
    workdir, config, sources = moved
    older = json.loads((workdir / "config.json").read_text())
    del older["data"]["buckets"], older["train"]["accumulate"]
    assert not configs.differences(older, config)
    (workdir / "config.json").write_text(json.dumps(older))
    config.data.buckets = ((32, 32), (24, 40))
    with pytest.raises(UserError, match=r"another config: data.buckets was \[\] and is \[\[32, 32\], \[24, 40\]\]"):
        open_run(workdir, config, sources)
    config.data.buckets = ()
    open_run(workdir, config, sources)
    assert "buckets" in configs.load(workdir / "config.json").data


def test_the_folder_of_another_jobs_run(moved):
    from configs import pair

    workdir, _, sources = moved
    with pytest.raises(UserError, match="holds a run of the job 'basis', and the config is of the job 'pair'; name a"):
        open_run(workdir, pair.smoke(), sources)


def test_fewer_steps_than_there_are(moved):
    """The run's record stays that of what it did."""
    workdir, config, sources = moved
    before, config.train.steps = files_in(workdir), 3
    with pytest.raises(UserError, match="at step 4, and config.train.steps is 3; give 4 or more, or another --workdir"):
        open_run(workdir, config, sources)
    assert files_in(workdir) == before


@pytest.mark.parametrize("field", ["pipeline", "basis.encoder", "data.root", "data.held_out"])
def test_other_files_are_refused_wherever_they_lie(moved, field):
    workdir, config, sources = moved
    before = files_in(workdir)
    with pytest.raises(UserError, match=f"began with other files than those of {field} .*give the same ones"):
        open_run(workdir, config, sources | {field: "other"})
    assert files_in(workdir) == before
    (workdir / "sources.json").unlink()
    open_run(workdir, config, sources | {field: "other"})  # as the sentence says


@pytest.mark.parametrize("kept", [None, "{", '{"pipeline": 5}', "[]"])
def test_a_run_of_which_no_fingerprints_were_kept(moved, kept):
    """An older run: the paths of models count; of data the saved position tells."""
    workdir, config, sources = moved
    (workdir / "sources.json").unlink()
    if kept:
        (workdir / "sources.json").write_text(kept)
    config.data.root = "/new/data"
    open_run(workdir, config, sources)
    config.pipeline = "/new/pipeline"
    (workdir / "sources.json").unlink()
    with pytest.raises(UserError, match="pipeline was 'old/pipeline' and is '/new/pipeline'; use the same values"):
        open_run(workdir, config, sources)


def test_checkpoints_without_a_config(moved):
    workdir, config, sources = moved
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match="holds checkpoints, but no config.json"):
        open_run(workdir, config, sources)
    with pytest.raises(UserError, match="holds checkpoints, but no config.json"), owned(workdir):
        pass
