"""Several processes as one run: the same losses, one that is killed or falls silent, SIGTERM, other meshes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import line_job
import numpy as np
import pytest
import yaml
from test_train_loop import LINE_JOB, losses, start

from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import make_job
from lorweb_jax.processes.distributed import Place, find_place
from lorweb_jax.training.loop import train

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The same run by one process with one device."""
    workdir = tmp_path_factory.mktemp("whole")
    train(line_job.get_config(), workdir, make_job)
    return workdir


class Processes:
    """launch/local.sh with the line job; its lines, and the processes' ids."""

    def __init__(self, count: int, workdir: Path, *options: str, devices: int = 1):
        self.workdir, self.lines = workdir, []
        self.run = subprocess.Popen(
            [
                ROOT / "launch/local.sh",
                str(count),
                f"--config={LINE_JOB}",
                f"--workdir={workdir}",
                "--config.line.pause=0.05",
                *options,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHON": sys.executable, "LORWEB_LOCAL_DEVICES": str(devices), "XLA_FLAGS": ""},
        )

    def until(self, pattern: str) -> None:
        for line in self.run.stdout:
            self.lines.append(line)
            if re.search(pattern, line):
                return
        raise AssertionError(self.text)

    def signal(self, index: int, number: int) -> float:
        """Seconds from a signal to one process until all have ended."""
        pid = int(re.search(rf"^\[{index}\] pid (\d+)", self.text, re.MULTILINE)[1])
        start = time.monotonic()
        os.kill(pid, number)
        self.end()
        return time.monotonic() - start

    def end(self) -> int:
        self.lines += self.run.communicate()[0].splitlines(keepends=True)
        return self.run.returncode

    @property
    def text(self) -> str:
        return "".join(self.lines)


def assert_same_losses(workdir: Path, whole_run: Path) -> None:
    """1e-5 relative, every step of the run."""
    found, expected = losses(workdir), losses(whole_run)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[step] for step in expected], list(expected.values()), rtol=1e-5)


def test_two_processes_train_as_one(whole_run, tmp_path):
    run = Processes(2, tmp_path / "run", "--config.mesh.fsdp=2", "--config.mesh.data=2", devices=2)
    assert run.end() == 0, run.text
    assert "4 devices in 2 processes" in run.text and "[1] step" not in run.text
    assert_same_losses(tmp_path / "run", whole_run)
    assert len(list((tmp_path / "run").glob("events*"))) == 1 and (tmp_path / "run/slope.npy").exists()


def test_stopped_and_killed_runs_go_on_with_other_processes_and_meshes(whole_run, tmp_path):
    workdir = tmp_path / "run"
    # SIGTERM to one of two: both end after the same step, with a checkpoint.
    run = Processes(2, workdir, devices=2)
    run.until(r"step 6/24")
    assert run.signal(1, signal.SIGTERM) < 30 and run.run.returncode == 0, run.text
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+), checkpoint written", run.text)[1])
    assert stopped in [int(path.name) for path in (workdir / "checkpoints").iterdir()]

    # kill -9 of process 0, where the coordinator is: the other one names it.
    run = Processes(2, workdir, "--config.mesh.tensor=2", devices=1)
    run.until(r"step 16/24")
    assert run.signal(0, signal.SIGKILL) < 60 and run.run.returncode == 128 + signal.SIGKILL
    assert f"going on from step {stopped}" in run.text
    assert re.search(
        r"^\[1\] error: process 0 \(host \S+\) is gone: its connection closed; "
        r"the same command goes on from step \d+$",
        run.text,
        re.MULTILINE,
    ), run.text

    run = Processes(1, workdir, "--config.mesh.tensor=2", devices=4)
    assert run.end() == 0 and "going on from step" in run.text, run.text
    assert_same_losses(workdir, whole_run)


def test_an_error_of_one_process_ends_all(tmp_path):
    """Each process in a folder of its own, which is what a run folder looks like that is not shared."""
    command = (
        "import os, sys; os.makedirs(folder := sys.argv.pop() + os.environ['JAX_PROCESS_ID']); os.chdir(folder);"
        "import lorweb_jax.runs.checkpoints as c; c.SHARED_WITHIN = 1;"
        "import lorweb_jax.main as m; from lorweb_jax.common.errors import run_command; run_command(m.command)"
    )
    port = 20000 + os.getpid() % 20000 * 2
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", command, f"--config={LINE_JOB}", "--workdir=run", str(tmp_path / "host")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)},
        )
        for index in range(2)
    ]
    errors = [run.communicate()[1] for run in runs]
    assert [run.returncode for run in runs] == [1, 1], errors
    assert re.search("error: the run folder .*host1/run of process 0 is not the one that process 1 sees", errors[1])
    assert re.search("error: process 1 .* ended: the run folder", errors[0])


def test_a_process_that_falls_silent_is_named(tmp_path):
    """SIGSTOP stands in for a host without network; 1 s instead of 60."""
    command = (
        "import sys, time; from lorweb_jax.processes.watch import Peers; index, port = map(int, sys.argv[2:]);"
        "sys.argv[2:] = []; Peers(('localhost', port), index, 3, silence=1.0); print('met', flush=True);"
        "time.sleep(60)"
    )
    port = 20000 + os.getpid() % 20000 * 2
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", command, "watch", str(index), str(port)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(3)
    ]
    try:
        assert [run.stdout.readline() for run in runs] == ["met\n"] * 3
        runs[2].send_signal(signal.SIGSTOP)
        for run in runs[:2]:
            _, errors = run.communicate(timeout=20)
            assert run.returncode == 1
            assert re.fullmatch(r"error: process 2 \(host \S+\) is gone: nothing was heard of it for 1 s; .*\n", errors)
    finally:
        runs[2].kill()


def test_sigterm_before_the_first_step_is_done(tmp_path):
    run = start(tmp_path / "run", "--config.line.pause=60")
    run.stdout.readline()  # the model is there, the first batch is not
    begin = time.monotonic()
    run.send_signal(signal.SIGTERM)
    output, errors = run.communicate()
    assert run.returncode == 0 and time.monotonic() - begin < 10, errors
    assert output.splitlines()[-1] == "stopped by SIGTERM; the same command begins again"


def test_a_checkpoint_is_restored_on_other_meshes(tmp_path):
    """Saved from 8 devices, restored on 4 and on 1: the same to the bit, split as the mesh says."""
    program = """
import sys; from pathlib import Path
import jax, numpy as np, optax
from lorweb_jax.nn import sharding
from lorweb_jax.runs.checkpoints import Checkpoints
rng, optimizer = np.random.default_rng(0), optax.adamw(1e-3)
names = {"basis.layers.transformer_blocks.attn.to_q.a": (2, 4, 8, 4), "basis.layers.transformer_blocks.attn.to_q.b":
         (2, 4, 4, 8), "basis.layers.transformer_blocks.attn.to_q.keys": (2, 4, 16)}
arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}
def shapes(devices, **sizes):
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1} | sizes, jax.devices()[:devices])
    return sharding.place(mesh, jax.eval_shape(lambda: {"trainable": arrays, "optimizer": optimizer.init(arrays)}))
trainable = {name: sharding.put(arrays[name], where) for name, where in shapes(8, data=2, fsdp=4)["trainable"].items()}
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, {"trainable": trainable, "optimizer": optimizer.init(trainable)}, {}, [])
checkpoints.finish()
for devices, sizes in ((4, {"fsdp": 2, "tensor": 2}), (1, {})):
    expected = shapes(devices, **sizes)
    state = checkpoints.restore(1, expected).state
    for name, array in state["trainable"].items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.sharding == expected["trainable"][name].sharding
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {devices}
checkpoints.close()
print("restored")
"""
    run = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
    )
    assert run.stdout == "restored\n", run.stderr


SLURM = {
    "SLURM_JOB_ID": "2005",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        (EXPLICIT, Place("10.0.0.1", 8476, 2, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[007-010]"}, Place("n007", 61450, 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,n[1,3]"}, Place("gpu-a", 61450, 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n7", "SLURM_STEP_NUM_NODES": "1"}, Place("n7", 61450, 4, 1, [1])),
        (SLURM | {"SLURM_STEP_NODELIST": "n7", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_a_process_finds_its_place(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    "change",
    [
        {"JAX_PROCESS_ID": "2"},
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_PROCESS_ID": ""},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"},
    ],
)
def test_a_contradictory_environment(change):
    with pytest.raises(UserError, match="JAX_") as error:
        find_place(EXPLICIT | change)
    assert error.value.code == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launch_script_without_options_says_what_it_needs(script):
    run = subprocess.run([script], capture_output=True, text=True)
    assert run.returncode == 2 and re.fullmatch(r"error: .+\n", run.stderr)


def test_the_jobset_names_the_hosts_alike_everywhere():
    jobset = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    hosts = jobset["spec"]["replicatedJobs"][0]
    job, pod = hosts["template"]["spec"], hosts["template"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry.get("value", "0") for entry in pod["containers"][0]["env"]}
    name = jobset["metadata"]["name"]
    assert find_place(environment) == Place(f"{name}-{hosts['name']}-0-0.{name}", 8476, job["completions"], 0)
    assert job["parallelism"] == job["completions"]
