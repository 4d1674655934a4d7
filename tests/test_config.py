"""Configs and the command line of main: overrides, misspelt fields, values no run could use."""

import subprocess
import sys
import time
from pathlib import Path

import line_job
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import make_job
from lorweb_jax.main import read_config, unknown_field
from lorweb_jax.settings import config as configs

LINE_JOB = str(Path(__file__).parent / "line_job.py")


def main(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "lorweb_jax.main", *options], capture_output=True, text=True)


def test_help_is_quick_and_does_not_import_jax():
    begin = time.perf_counter()
    shown = main("--help")
    assert time.perf_counter() - begin < 3
    assert shown.returncode == 0 and "--config=configs/basis.py" in shown.stdout and "--workdir" in shown.stdout
    code = "import sys, lorweb_jax.main; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "options, told",
    [
        ([], "no config was given"),
        ([f"--config={LINE_JOB}", "--config.train.stepz=3"], "config.train.steps"),
        ([f"--config={LINE_JOB}", "--config.train.steps=many"], "config.train.steps=many"),
        ([f"--config={LINE_JOB}", "--config.train.steps=0"], "a whole number from 1 to"),
        ([f"--config={LINE_JOB}", "--wrokdir=x"], "workdir"),
        (["--config=configs/nothing.py"], "no config file"),
        (["--config=configs/basis.py", "--config.optimizer.b1=nan"], "config.optimizer.b1 is nan; it must be a number"),
        (["--config=configs/basis.py", "--config.basis.query_dim=0"], "config.basis.query_dim is 0"),
        (["--config=configs/basis.py", "--config=configs/basis.py"], "2 configs were given"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_answered_in_one_line(options, told):
    shown = main(*options)
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.count("\n") == 1 and shown.stderr.startswith("error: ") and told in shown.stderr


def test_unknown_variant():
    with pytest.raises(UserError, match="no variant 'nothing'; its variants are: average") as caught:
        read_config(LINE_JOB + ":nothing")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "name, near",
    [
        ("config.train.bacth", "config.train.batch"),
        ("config.steps", "config.train.steps"),
        ("config.optimizer", "config.optimizer.learning_rate"),
    ],
)
def test_a_misspelt_field_names_the_nearest(name, near):
    assert near in str(unknown_field(name, dict(configs.fields(line_job.get_config()))))


@pytest.mark.parametrize(
    "text, told",
    [
        ("def get_config(:", "SyntaxError in line 1"),
        ("import nothing_of_this_name", "ModuleNotFoundError in line 1, No module named"),
        ("def get_config():\n    return nothing", "NameError in line 2"),
        ("def get_config():\n    return {}", "no function get_config that gives a ConfigDict"),
        ("x = 1", "no function get_config"),
        (b"\xff\x00", "SyntaxError"),
    ],
)
def test_a_config_file_that_can_not_be_run(tmp_path, text, told):
    file = tmp_path / "config.py"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=told) as caught:
        read_config(str(file))
    assert caught.value.code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "job, told",
    [
        ("nothing_of_this_name:make", "no module nothing_of_this_name"),
        ("line_job:nothing", "line_job has no function nothing"),
        ("lorweb_jax.nothing.at_all:make", "no module lorweb_jax.nothing"),
    ],
)
def test_a_job_that_is_not_there(job, told):
    config = line_job.get_config()
    config.job = job
    with pytest.raises(UserError, match=told) as caught:
        make_job(config)
    assert caught.value.code == 2


def test_a_saved_config_comes_back_and_shows_what_differs(tmp_path):
    config = line_job.get_config()
    config.line.tuple = (1, 2)
    configs.save(config, tmp_path / "config.json")
    loaded = configs.load(tmp_path / "config.json")
    assert configs.differences(loaded, config) == {}
    config.optimizer.b2 = 0.5
    config.line.added = "x"
    assert configs.differences(loaded, config) == {"optimizer.b2": (0.99, 0.5), "line.added": (None, "x")}


def test_a_damaged_config_is_a_user_error(tmp_path):
    for text in (
        "{",
        "",
        "[]",
        "{}",
        '{"job": "basis"}',
        '{"job": 5, "train": {"ema": 0.0}}',
        b"\xff",
        "[" * 10**5,
        '{"job": "basis", "train": {"ema": "0"}}',
        '{"job": "basis", "train": {"ema": NaN}}',
        '{"job": "basis", "train": {"ema": 0.0}, "a.b": 1}',
        '{"job": "basis", "train": []}',
    ):
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match="config.json.*a training run"):
            configs.load(tmp_path / "config.json")
    with pytest.raises(UserError, match="name the folder of a training run"):
        configs.load(tmp_path / "nothing.json")


def test_default_workdir():
    assert configs.default_workdir("configs/basis.py") == Path("runs/basis")
    assert configs.default_workdir("configs/basis.py:tanh") == Path("runs/basis_tanh")
