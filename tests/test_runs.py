"""python -m lorweb_jax.runs: states, figures and pictures of runs as training leaves them."""

import json
import os
import re
import shutil
from pathlib import Path

import line_job
import numpy as np
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.io import write_image
from lorweb_jax.runs import listing
from lorweb_jax.runs.__main__ import main
from lorweb_jax.training.loop import train


class Scored(line_job.LineJob):
    """Its score is that of the step; the best is that of step 10."""

    def validate(self, model, step):
        return {5: 3.0, 10: 1.25}.get(step, 2.0)

    def keep(self, model, folder: Path):
        shutil.copy(folder.parent / "config.json", folder / "config.json")  # a run of its own
        (folder / "log.txt").touch()

    def log_images(self, model, step):
        if step > 12:
            raise KeyboardInterrupt if self.stops else RuntimeError("no\npicture")
        return super().log_images(model, step)

    stops = False


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """finished, failed and stopped by control-C as training leaves them; killed, and of a living process."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name, bad_step=-1, command="", stops=False):
        config = line_job.get_config()
        config.line.bad_step, job = bad_step, Scored()
        job.stops = stops
        return train(config, folder / name, lambda config: job, command)

    assert run("finished", command="python -m lorweb_jax.main --config='a <b>.py'")
    with pytest.raises(UserError, match="step 8"):
        run("group/failed", bad_step=7)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stops=True)
    for name in ("killed", "running"):
        shutil.copytree(folder / "group" / "failed", folder / name)
        (folder / name / "outcome.json").unlink()
    owner = {"pid": os.getppid(), "host": os.uname().nodename, "since": "2026-01-01 00:00:00"}
    (folder / "running" / ".lock").write_text(json.dumps(owner))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")  # no run
    return folder


def by_name(folder):
    """({name: run}, {name: state}) of the runs in a folder."""
    found = {run.name: run for run in listing.find_runs(folder)}
    return found, {name: run.state for name, run in found.items()}


def test_states_and_figures(runs):
    found, states = by_name(runs)
    assert states == {
        "finished": "finished",
        "group/failed": "failed",
        "killed": "stopped",
        "running": "running",
        "stopped": "stopped",
    }
    run = found["finished"]
    assert (run.steps, run.planned, run.best, run.job) == (24, 24, (10, 1.25), "line_job:make")
    lines = (runs / "finished" / "log.txt").read_text().splitlines()
    assert run.losses == tuple((int(line.split()[1]), float(line.split()[3])) for line in lines) and len(lines) == 24
    assert [path.name for path in run.pictures] == ["slope_000012.png"]
    failed = found["group/failed"]
    assert "the loss is nan at step 8" in failed.remark and failed.steps == 7
    assert str(os.getppid()) in found["running"].remark


def test_table_and_page(runs, capsys):
    main([str(runs)])
    told = capsys.readouterr().out.splitlines()
    assert told[0].split()[:3] == ["run", "state", "steps"] and told[-1] == f"wrote {runs / 'runs.html'}"
    row = next(line.split() for line in told if line.startswith("finished"))
    assert row[1:3] == ["finished", "24/24"] and row[4:6] == ["1.25", "10"]
    page = (runs / "runs.html").read_text()
    assert page.count("<h2") == 5 and page.count("<svg") == 5 and page.count("data:image/") == 2
    assert "--config=&#x27;a &lt;b&gt;.py&#x27;" in page and "the loss is nan at step 8" in page
    assert not re.search("(src|href)=[\"'](?!data:|#)", page)


def test_damaged_runs_are_a_row_each(runs, tmp_path, capsys):
    for name, file, text in (
        ("config", "config.json", "["),
        ("best", "best.json", '{"step": "x"}'),
        ("half", "best.json", '{"step": 1}'),
        ("log", "log.txt", "step 3  loss x\nstep 4  closs 2\nstep 5  a 1  loss 0.5"),
    ):
        shutil.copytree(runs / "finished", tmp_path / name)
        (tmp_path / name / file).write_text(text)
    (tmp_path / "log" / "pictures" / "slope_000012.png").write_bytes(b"none")
    write_image(tmp_path / "log" / "pictures" / "a_b_000001.png", np.zeros((8, 8, 3), np.uint8))
    main([str(tmp_path), "--out", str(tmp_path / "made" / "page.html")])
    assert (tmp_path / "made" / "page.html").exists()
    found, states = by_name(tmp_path)
    assert states == {"best": "unreadable", "config": "unreadable", "half": "unreadable", "log": "finished"}
    assert found["log"].losses == ((5, 0.5),) and len(found["log"].pictures) == 2
    told = capsys.readouterr().out
    assert "config: " in told and "config.json" in told


def test_no_runs(tmp_path):
    with pytest.raises(UserError, match="there is no folder") as error:
        main([str(tmp_path / "none")])
    assert error.value.code == 2
    with pytest.raises(UserError, match="holds no run"):
        main([str(tmp_path)])
