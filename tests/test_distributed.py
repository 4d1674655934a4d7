"""Several processes as one run: the same losses, one that is killed or falls silent, SIGTERM, other meshes."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import line_job
import numpy as np
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster
from test_train_loop import LINE_JOB, losses, start

from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import make_job
from lorweb_jax.processes.distributed import EXPLICIT, Place, find_place, joined
from lorweb_jax.training.loop import train

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {  # one process on each of four nodes
    "SLURM_JOB_ID": "2005",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_NODES": "4",
}
SILENCE = 6  # s after which a process counts as gone; 60 by default


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The same run by one process with one device."""
    workdir = tmp_path_factory.mktemp("whole")
    train(line_job.get_config(), workdir, make_job)
    return workdir


class Processes:
    """launch/local.sh with the line job; its lines, and the processes' ids."""

    def __init__(self, count: int, workdir: Path, *options: str, devices: int = 1, **environment: str):
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
            env=os.environ
            | {"PYTHON": sys.executable, "LORWEB_LOCAL_DEVICES": str(devices), "XLA_FLAGS": ""}
            | {"LORWEB_HEARTBEAT_TIMEOUT": str(SILENCE)}
            | environment,
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


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def assert_same_losses(workdir: Path, whole_run: Path) -> None:
    """1e-5 relative, every step of the run."""
    found, expected = losses(workdir), losses(whole_run)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[step] for step in expected], list(expected.values()), rtol=1e-5)


def test_two_processes_train_as_one_beside_strangers_at_their_port(whole_run, tmp_path):
    port = free_port()
    run = Processes(
        2, tmp_path / "run", "--config.mesh.fsdp=2", "--config.mesh.data=2", devices=2, JAX_COORDINATOR_PORT=str(port)
    )
    run.until(r"step 2/24")
    with contextlib.ExitStack() as strangers:
        for text in (b"", os.urandom(4096), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\0" * 100_000):
            stranger = strangers.enter_context(socket.create_connection(("localhost", port)))
            with contextlib.suppress(OSError):
                stranger.sendall(text)
        assert run.end() == 0, run.text
    assert "4 devices in 2 processes" in run.text and "[1] step" not in run.text
    assert_same_losses(tmp_path / "run", whole_run)
    assert len(list((tmp_path / "run").glob("events*"))) == 1 and (tmp_path / "run/slope.npy").exists()


def test_stopped_and_killed_runs_go_on_with_other_processes_and_meshes(whole_run, tmp_path):
    workdir = tmp_path / "run"
    slow = "--config.line.pause=0.15", "--config.train.checkpoint_every=2"
    # kill -9 of one of four, and then of process 0 of two, where the coordination service is: the others name it.
    for count, killed, step, why in (
        (4, 2, 6, f"nothing was heard of it for {SILENCE} s"),
        (2, 0, 10, "it does not answer"),
    ):
        run = Processes(count, workdir, *slow, "--config.mesh.tensor=2", devices=4 // count)
        run.until(f"step {step}/24")
        assert run.signal(killed, signal.SIGKILL) < 60 and run.run.returncode == 128 + signal.SIGKILL
        for other in {*range(count)} - {killed}:
            # Nothing else from jax or of Python's: no log entry, no traceback.
            [line] = re.findall(rf"^\[{other}\] (?:\S*[eE]rror|[EF]\d|Traceback|\*).*\n", run.text, re.MULTILINE)
            assert re.fullmatch(
                rf"\[{other}\] error: process {killed} \(host \S+\) is gone: {why}; "
                r"the same command goes on from step \d+\n",
                line,
            ), run.text

    # SIGTERM to one of two: both end after the same step, with a checkpoint.
    run = Processes(2, workdir, *slow, devices=2)
    run.until(r"step 11/24")
    assert "going on from step" in run.text
    assert run.signal(1, signal.SIGTERM) < 30 and run.run.returncode == 0, run.text
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+), checkpoint written", run.text)[1])
    assert stopped in [int(path.name) for path in (workdir / "checkpoints").iterdir()]

    run = Processes(1, workdir, *slow, "--config.mesh.tensor=2", devices=4)
    assert run.end() == 0 and "going on from step" in run.text, run.text
    assert_same_losses(workdir, whole_run)


class Alone:
    """One process of a run, started by hand: of the line job, or of a program that joins the run and waits."""

    JOINS = """
import sys, time
from lorweb_jax.common.errors import run_command
from lorweb_jax.processes import distributed
def command():
    with distributed.joined({"arguments": sys.argv[1:]}):
        print("joined", flush=True)
        time.sleep(100)
run_command(command)
"""

    def __init__(self, index: int, count: int, port: int, *arguments: str, program: str = JOINS, **environment: str):
        explicit = zip(EXPLICIT, (f"localhost:{port}", str(count), str(index)))
        self.run = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"LORWEB_HEARTBEAT_TIMEOUT": str(SILENCE)} | dict(explicit) | environment,
        )

    def end(self) -> tuple[int, str]:
        """Exit status and standard error."""
        try:
            errors = self.run.communicate(timeout=300)[1]
        finally:
            self.run.kill()
        return self.run.returncode, errors


@pytest.fixture
def alone():
    """Starts processes, and leaves none behind."""
    runs = []
    yield lambda *args, **named: runs.append(Alone(*args, **named)) or runs[-1]
    for one in runs:
        one.run.kill()


def test_who_cannot_join_says_why(alone):
    quick = {"LORWEB_START_TIMEOUT": "3"}
    ports = [free_port() for _ in range(3)]
    waits, seeks = alone(0, 2, ports[0], **quick), alone(1, 2, ports[1], **quick)
    unequal = [alone(index, 2, ports[2], f"--steps={5 + index}") for index in range(2)]

    error = f"error: not all of the 2 processes came to localhost:{ports[0]} within 3 s; start all processes again\n"
    assert waits.end() == (1, error)
    status, error = seeks.end()
    assert status == 1 and re.fullmatch(
        rf"error: process 1 of 2 could not reach process 0 at localhost:{ports[1]} within 3 s \(.+\); check .+\n", error
    )
    said = (
        "process 1 was started with other options than process 0: arguments is ['--steps=6'] here, ['--steps=5'] "
        "there; give all processes the same"
    )
    assert unequal[1].end() == (2, f"error: {said}\n")
    status, error = unequal[0].end()
    assert status == 2  # the other's
    assert re.fullmatch(rf"error: process 1 \(host \S+\) ended: {re.escape(said)}; start all .+\n", error), error


def test_a_number_too_high_and_a_number_twice(alone):
    port = free_port()
    run = [alone(index, 2, port) for index in range(2)]
    assert run[0].run.stdout.readline() == "joined\n"
    status, error = alone(2, 3, port).end()
    assert status == 1
    assert re.fullmatch("error: process 2 was started, but process 0 expects fewer processes than 3; .+\n", error), (
        error
    )
    assert [one.run.poll() for one in run] == [None, None]  # the run outlives it, but not this one:
    second = alone(1, 2, port, LORWEB_START_TIMEOUT="3")
    alone(0, 3, other := free_port())
    twins = [alone(1, 3, other) for _ in range(2)]  # before all have come
    for one in run:
        status, error = one.end()
        assert status == 1
        assert re.fullmatch("error: process 1 was started a second time while the run was at it; .+\n", error), error
    status, error = second.end()
    assert status == 1 and re.fullmatch("error: process 1 .+\n", error), error
    while all(one.run.poll() is None for one in twins):
        time.sleep(0.1)
    status, error = next(one for one in twins if one.run.poll() is not None).end()
    assert status == 1 and re.fullmatch("error: another process was started as process 1 too; .+\n", error), error


def test_a_process_0_that_falls_silent_is_named(alone):
    """SIGSTOP stands in for a host without network."""
    port = free_port()
    run = [alone(index, 2, port) for index in range(2)]
    assert run[0].run.stdout.readline() == "joined\n"
    run[0].run.send_signal(signal.SIGSTOP)
    status, error = run[1].end()
    assert status == 1
    assert re.fullmatch(r"error: process 0 \(host \S+\) is gone: it does not answer; .+\n", error), error


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("", 0)) as server:
        for name, value in zip(EXPLICIT, (f"localhost:{server.getsockname()[1]}", "2", "0")):
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"port {server.getsockname()[1]} of .* can't be used"), joined({}):
            raise AssertionError("it started")


def test_an_error_of_one_process_ends_all(alone, tmp_path):
    """Each process in a folder of its own, which is what a run folder looks like that is not shared."""
    program = (
        "import os, sys; os.makedirs(folder := sys.argv.pop() + os.environ['JAX_PROCESS_ID']); os.chdir(folder);"
        "import lorweb_jax.runs.folder as f; f.SHARED_WITHIN = 1;"
        "import lorweb_jax.main as m; from lorweb_jax.common.errors import run_command; run_command(m.command)"
    )
    arguments = f"--config={LINE_JOB}", "--workdir=run", str(tmp_path / "host")
    port = free_port()
    ends = [run.end() for run in [alone(index, 2, port, *arguments, program=program) for index in range(2)]]
    assert [status for status, _ in ends] == [1, 1], ends
    said = "the run folder .*host1/run of process 0 is not the one that process 1 sees on .*"
    assert re.fullmatch(f"error: {said}\n", ends[1][1]), ends
    assert re.fullmatch(rf"error: process 1 \(host \S+\) ended: {said}\n", ends[0][1]), ends


def test_slurm_starts_processes_and_sigterm_before_the_first_step_ends_them(alone, tmp_path):
    """As srun sets the environment of two processes on one node; SIGTERM to one, when the first batch is not there."""
    program = "import lorweb_jax.main as m; from lorweb_jax.common.errors import run_command; run_command(m.command)"
    arguments = f"--config={LINE_JOB}", f"--workdir={tmp_path / 'run'}", "--config.line.pause=100"
    none = dict.fromkeys(EXPLICIT, "")
    slurm = SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_ID": str(free_port() - 61440)}  # jax takes the port 61440 + job's number mod 4096
    run = [
        alone(
            index,
            2,
            0,
            *arguments,
            program=program,
            **none | slurm | {"SLURM_PROCID": str(index), "LORWEB_STOP_STATUS": "75"},
        )
        for index in range(2)
    ]
    assert any("in 2 processes" in line for line in run[0].run.stdout)
    start = time.monotonic()
    run[1].run.send_signal(signal.SIGTERM)
    assert run[0].run.stdout.read().endswith("\nstopped by SIGTERM; the same command begins again\n")
    assert time.monotonic() - start < 20
    assert [one.end() for one in run] == [(75, ""), (75, "")]


def listening(pid: int) -> list[str]:
    """Lines of /proc/net/tcp about sockets at which a process listens."""
    targets = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    tables = [Path(f"/proc/{pid}/net/{name}") for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in targets]


def test_sigterm_before_the_first_step_is_done(tmp_path):
    run = start(tmp_path / "run", "--config.line.pause=60")
    run.stdout.readline()  # the model is there, the first batch is not
    if os.path.isdir("/proc"):
        assert listening(run.pid) == []  # one process needs no port
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
    axes = {name: sharding.basis_axes("column")[name.rpartition(".")[2]] for name in names}
    state = jax.eval_shape(lambda: {"trainable": arrays, "optimizer": optimizer.init(arrays)})
    return sharding.place(mesh, state, axes)
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


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # of which jax warns, where the package kubernetes is missing
        (ADDRESS, Place("10.0.0.1:8476", 2, 1)),
        (ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        (SLURM | {"SLURM_STEP_NODELIST": "n[007-010]"}, Place("n007:63445", 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,n[1,3]"}, Place("gpu-a:63445", 4, 1)),
        (
            SLURM | {"SLURM_STEP_NODELIST": "n7", "SLURM_STEP_NUM_NODES": "1", "SLURM_LOCALID": "1"},
            Place("n7:63445", 4, 1, (1,)),
        ),
        (SLURM | {"SLURM_STEP_NODELIST": "n7", "JAX_COORDINATOR_PORT": "1234"}, Place("n7:1234", 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "n7", "JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"SLURM_STEP_NODELIST": "n7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_process_finds_its_place(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert find_place() == place


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("hosts", [1, 4])
def test_a_process_finds_its_place_in_tpu_slices(monkeypatch, hosts, slices):
    """As GKE sets the environment of the last host."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(jax._src.clusters.cluster, "running_in_cloud_tpu_vm", True)
    environment = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": str(hosts - 1)}
    environment |= {"TPU_WORKER_HOSTNAMES": ",".join(["localhost", "b", "c", "d"][:hosts])}
    environment |= {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": str(slices)}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MEGASCALE_SLICE_ID", str(slices - 1))
    count = hosts * slices
    assert find_place() == (Place("localhost:8482", count, count - 1) if count > 1 else None)


def test_a_cluster_that_cannot_be_asked(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_NODELIST": "n7", "SLURM_JOB_ID": "none"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="can't be asked about it .*JAX_NUM_PROCESSES=1 for one process"):
        find_place()


@pytest.mark.parametrize(
    "change",
    [
        {"JAX_PROCESS_ID": "2"},
        {"JAX_NUM_PROCESSES": "two"},
        {"JAX_PROCESS_ID": ""},
        {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"},
    ],
)
def test_a_contradictory_environment(monkeypatch, change):
    for name, value in (ADDRESS | change).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="JAX_") as error:
        find_place()
    assert error.value.code == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_launch_script_without_options_says_what_it_needs(script):
    run = subprocess.run([script], capture_output=True, text=True)
    assert run.returncode == 2 and re.fullmatch(r"error: .+\n", run.stderr)


def test_the_jobset_names_the_hosts_alike_everywhere(monkeypatch):
    jobset = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    hosts = jobset["spec"]["replicatedJobs"][0]
    job, pod = hosts["template"]["spec"], hosts["template"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry.get("value", "0") for entry in pod["containers"][0]["env"]}
    name = jobset["metadata"]["name"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert find_place() == Place(f"{name}-{hosts['name']}-0-0.{name}:8476", job["completions"], 0)
    assert job["parallelism"] == job["completions"]
