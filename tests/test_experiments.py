"""tools/experiments: what has a record isn't trained again, and the tables choose and report on different prompts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from lorweb_jax.common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from experiments import pair_tables, runner  # noqa: E402


@pytest.fixture
def trained(monkeypatch):
    """Names of the run folders that were trained."""
    names = []

    def train(config, workdir, make_job):
        names.append(workdir.name)
        workdir.mkdir(parents=True)
        (workdir / "loss").write_text(str(config.rate))

    monkeypatch.setattr(runner, "train", train)
    return names


def trials(**changes):
    labels = runner.grid(seed=range(2), method=("one", "two"))
    return [runner.Trial(each, ConfigDict({"rate": each["seed"] + 0.5} | changes)) for each in labels]


def measure(trial, folder):
    return {"loss": float((folder / "loss").read_text())}


def test_a_broken_off_experiment_goes_on(tmp_path, trained):
    assert [trial.name for trial in trials()] == ["0_one", "0_two", "1_one", "1_two"]
    runner.run(trials()[:3], tmp_path, measure)
    records = runner.run(trials(), tmp_path, measure)
    assert trained == ["0_one", "0_two", "1_one", "1_two"]
    assert [record["loss"] for record in records] == [0.5, 0.5, 1.5, 1.5]
    assert records[3]["labels"] == {"seed": 1, "method": "two"} and not list((tmp_path / "runs").iterdir())


def test_records_of_another_config_are_refused(tmp_path, trained):
    runner.run(trials(steps=3)[:1], tmp_path, measure)
    with pytest.raises(UserError, match="0_one.json is of a run whose steps was 3, and now it is 4"):
        runner.run(trials(steps=4)[:1], tmp_path, measure)
    assert trained == ["0_one"]


def record(seed, pair, method, settings):
    """lpips by prompt as given; the other measures follow from it."""
    distances = {}
    for setting, values in settings.items():
        values = np.array(values)
        distances[setting] = {"content": (1 - values).tolist(), "style": values.tolist()}
        if pair != "drawn by people":
            distances[setting] |= {"lpips": values.tolist(), "mse": (values**2).tolist()}
    return {"labels": {"seed": seed, "pair": pair, "method": method}, "seconds": 30.0, "distances": distances}


def test_a_strength_is_chosen_on_other_prompts_than_it_is_reported_on(tmp_path):
    """Prompts 0, 2 choose, 1, 3 are reported; averages over seeds; pairs without a truth count for style alone."""
    records = [
        record(seed, pair, "pair", {"strength 1": [0.5, 0.1, 0.5, 0.1], "strength 2": [0.4, 0.2 + seed / 5, 0.4, 0.4]})
        for seed in (0, 1)
        for pair in ("sepia", "drawn by people")
    ]
    records += [record(0, "sepia", "lora", {"strength 1": [0.6, 0.5, 0.6, 0.7], "weight 1": [0.3, 0.3, 0.3, 0.3]})]
    text = pair_tables.write_tables(records, tmp_path)
    methods = json.loads((tmp_path / "table.json").read_text())["methods"]
    assert {name: figures["setting"] for name, figures in methods.items()} == {
        "pair": "strength 2",
        "lora": "strength 1",
        "lora, weight": "weight 1",
    }
    assert methods["pair"]["lpips"]["mean"] == pytest.approx(np.mean([0.3, 0.4]))
    assert methods["pair"]["style"]["mean"] == pytest.approx(np.mean([0.3, 0.4, 0.3, 0.4]))
    assert methods["lora"]["mse"]["mean"] == pytest.approx(np.mean([0.25, 0.49]))
    low, high = methods["lora"]["lpips_against_first"]
    assert low == pytest.approx(0.2) and high == pytest.approx(0.3)
    assert "5 trainings, 2 min in all" in text and (tmp_path / "curves.png").is_file()
