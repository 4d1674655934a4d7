"""Commands that argparse reads: help without jax, one sentence for what makes no sense."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lorweb_jax import edit, evaluate, export
from lorweb_jax.common.errors import UserError

COMMANDS = [
    f"lorweb_jax.{name}"
    for name in ("edit", "stylize", "export", "evaluate", "base_report", "data.measure", "data.look")
]
# The two of gpu_session measure a GPU, and import their framework at once.
TOOLS = sorted(
    str(file)
    for file in [*(ROOT / "tools").glob("*.py")]
    if "__main__" in file.read_text() and "Parser(" in file.read_text()
)

RUN_ALL = """
import contextlib, io, json, runpy, sys
sys.modules["jax"] = None  # importing it is an error
shown = {}
for name in sys.argv[1:]:
    for option in ("--help", "--nothing-of-this-name"):
        sys.argv = [name, option]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
            except SystemExit as end:
                shown[f"{name} {option}"] = [end.code, out.getvalue(), err.getvalue()]
print(json.dumps(shown))
"""


def test_every_command_answers_before_jax_is_imported():
    run = subprocess.run([sys.executable, "-c", RUN_ALL, *COMMANDS, *TOOLS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = json.loads(run.stdout)
    assert len(TOOLS) >= 10
    for name in [*COMMANDS, *TOOLS]:
        status, out, err = shown[f"{name} --help"]
        assert status == 0 and out.startswith("usage: ") and not err, name
        status, out, err = shown[f"{name} --nothing-of-this-name"]
        assert status == 2 and not out, name
        assert err.startswith("error: ") and err.endswith("; see --help\n") and err.count("\n") == 1, err


EDIT = ["--a=a.png", "--a2=a2.png", "--b=b.png"]


@pytest.mark.parametrize(
    "command, arguments, said",
    [
        (edit, [*EDIT, "--out="], "--out is ''; give an image file or a folder"),
        (edit, [*EDIT, "--out=r.png", "--basis="], "--basis: '' is no path"),
        (edit, [*EDIT, "--out=r.png", "--steps=two"], "--steps: invalid int value: 'two'"),
        (edit, [*EDIT, "--out=/dev/null"], "^/dev/null is a device or a pipe"),
        (edit, [*EDIT, "--out=file/r.png"], "^file/r.png could not be written, for file is a file and no folder"),
        (evaluate, [".", "--pipeline=p", "--data="], "--data '' is no SPLIT=FOLDER"),
        (evaluate, [".", "--pipeline=p", "--data=d", "--config=c"], "unrecognized arguments: --config=c"),
        (export, ["lora", "basis", ""], "out: '' is no path"),
        (export, ["published"], "arguments are required: run, out"),
    ],
)
def test_one_sentence_and_nothing_written(tmp_path, monkeypatch, command, arguments, said):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a2.png", "b.png", "file"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=said) as caught:
        command.main(arguments)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    assert len(os.listdir(tmp_path)) == 4
