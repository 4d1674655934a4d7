"""tools/experiments: what has a record isn't trained again, and the tables choose and report on different prompts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from configs import basis as basis_config
from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation.statistics import bootstrap_interval, crossed_interval
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.settings import config as configs

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from experiments import basis, basis_methods, basis_pictures, basis_tables, pair_tables, runner  # noqa: E402


@pytest.fixture
def trained(monkeypatch):
    """Names of the run folders that were trained."""
    names = []

    def train(config, workdir, make_job):
        names.append(workdir.name)
        workdir.mkdir(parents=True)
        (workdir / "loss").write_text(str(config.rate))
        return True

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
        distances[setting] = {"content": (1 - values).tolist(), "style": values.tolist(), "example": values.tolist()}
        if pair != "drawn by people":
            distances[setting] |= {"lpips": values.tolist(), "mse": (values**2).tolist()}
    return {"labels": {"seed": seed, "pair": pair, "method": method}, "seconds": 30.0, "distances": distances}


def test_a_strength_is_chosen_on_other_prompts_than_it_is_reported_on(tmp_path):
    """For each pair: prompts 0, 2 choose, 1, 3 are reported; averages over seeds. Pairs without a truth are shown at
    the median of the others' strengths and count for style alone."""
    records = [
        record(seed, pair, "pair", {"strength 1": [0.5, 0.1, 0.5, 0.1], "strength 2": [0.4, 0.2 + seed / 5, 0.4, 0.4]})
        for seed in (0, 1)
        for pair in ("sepia", "drawn by people")
    ]
    records += [record(0, "ink", "pair", {"strength 1": [0.2, 0.6, 0.2, 0.6], "strength 2": [0.3, 0.1, 0.3, 0.1]})]
    records += [record(0, "sepia", "lora", {"strength 1": [0.6, 0.55, 0.6, 0.75], "weight 1": [0.3, 0.3, 0.3, 0.3]})]
    records += [record(0, "ink", "lora", {"strength 1": [0.6, 0.5, 0.6, 0.7], "weight 1": [0.3, 0.3, 0.3, 0.3]})]
    text = pair_tables.write_tables(records, tmp_path)
    methods = json.loads((tmp_path / "table.json").read_text())["methods"]
    assert {name: figures["setting"] for name, figures in methods.items()} == {
        "pair": {"sepia": "strength 2", "ink": "strength 1", "drawn by people": "strength 2"},
        "lora": dict.fromkeys(("sepia", "ink"), "strength 1"),
        "lora, weight": dict.fromkeys(("sepia", "ink"), "weight 1"),
    }
    assert methods["pair"]["lpips_by_pair"] == pytest.approx({"sepia": 0.35, "ink": 0.6})
    assert methods["pair"]["lpips"]["mean"] == pytest.approx(np.mean([0.3, 0.4, 0.6, 0.6]))
    assert methods["pair"]["style"]["mean"] == pytest.approx(np.mean([0.3, 0.4, 0.6, 0.6, 0.3, 0.4]))
    assert methods["lora"]["mse"]["mean"] == pytest.approx(np.mean([0.55**2, 0.75**2, 0.25, 0.49]))
    # Cell by cell of one pair and prompt, whatever the strengths: 0.55, 0.75, 0.5, 0.7 less 0.3, 0.4, 0.6, 0.6.
    differences = bootstrap_interval([0.25, 0.35, -0.1, 0.1])
    assert methods["lora"]["lpips_against_first"] == pytest.approx(differences)
    assert "7 trainings, 4 min in all" in text and "0.600 (1)" in text and (tmp_path / "curves.png").is_file()


@pytest.mark.parametrize("best, tried", [(2, [2, 4, 1]), (8, [2, 4, 8, 16]), (0.5, [2, 4, 1, 0.5, 0.25]), (99, None)])
def test_a_learning_rate_is_doubled_or_halved_as_long_as_that_helps(best, tried):
    asked = []

    def error(rate):
        asked.append(rate)
        return abs(np.log2(rate / best))

    assert basis.climb(error, 2.0) == (best if tried else 2.0 * 2**basis.RATE_STEPS)
    assert asked == tried or tried is None


def rank_of_as_many_numbers(config):
    """That of one LoRA with as many numbers as N members, keys of width k and projections of E(a), E(a′), E(b)."""
    folder = PipelineFolder(ROOT / config.pipeline)
    n, r, k = config.basis.size, config.basis.rank, config.basis.key_dim
    query = 3 * json.loads((ROOT / config.pipeline / "clip_vision" / "config.json").read_text())["projection_dim"]
    layers = [(each.depth, each.inputs + each.outputs) for each in folder.backbone.adapted.values()]
    numbers = sum(depth * (n * r * sides + n * k + k * query) for depth, sides in layers)
    return round(numbers / sum(depth * sides for depth, sides in layers))


def test_every_method_has_a_config_that_can_be_run():
    """One LoRA has the rank that its title says; variants take the rate of a method that has a sweep."""
    for name, method in basis_methods.METHODS.items():
        config = basis_config.default()
        method.apply(config)
        configs.check(config)
        if name in ("lora_nr", "lora_r", "lora_equal"):
            assert (config.basis.size, config.basis.query) == (1, "fixed")
            expected = {"lora_nr": 16 * 4, "lora_r": 4}.get(name) or rank_of_as_many_numbers(basis_config.default())
            assert config.basis.rank == expected
        assert method.rate_of == "" or basis_methods.METHODS[method.rate_of].rate_of == ""
    assert {name for group in basis_methods.GROUPS.values() for name in group.methods} == basis_methods.METHODS.keys()


def test_an_interval_over_seeds_and_tasks():
    """Against the same resampling written out; with one seed it is the bootstrap over tasks."""
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 7)) + random.normal(size=(3, 1)) + random.normal(size=7)
    means = []
    for _ in range(20_000):
        seeds, tasks = random.integers(0, 3, 3), random.integers(0, 7, 7)
        means.append(x[np.ix_(seeds, tasks)].mean())
    np.testing.assert_allclose(crossed_interval(x), np.percentile(means, [2.5, 97.5]), atol=0.06)
    np.testing.assert_allclose(crossed_interval(x[:1]), bootstrap_interval(x[0]), rtol=1e-12)


def basis_record(method, rate, seed, error, parameters=0):
    """Errors by task on every split; the other scores follow."""
    by_task = {
        f"task{i}": {"lpips": e, "lpips_b": 2 * e, "mse": e**2, "clip_directional": 1 - e, "alexnet_directional": 1 - e}
        for i, e in enumerate(error)
    }
    labels = {"method": method, "seed": seed} | ({"rate": rate} if rate else {})
    scores = {"train": by_task, "held_out_drawings": by_task, "held_out_tasks": by_task}
    return {"labels": labels, "seconds": 60.0, "parameters": parameters, "scores": scores}


def test_tables_of_a_basis_against_one_lora(tmp_path):
    """Paired by seed and task at the chosen rate of each; of what a sweep tried beside it nothing is shown."""
    records = [
        basis_record("basis", 0.001, 0, [0.9, 0.9, 0.9]),  # tried by the sweep
        basis_record("basis", 0.002, 0, [0.2, 0.4, 0.3], 77),
        basis_record("basis", 0.002, 1, [0.3, 0.3, 0.3])
        | {"router": {"members": 16, "one": 2.5, "task": 3.0, "all": 9.04, "unused": 1.0}},
        basis_record("lora_nr", 0.004, 0, [0.3, 0.3, 0.4]),
        basis_record("base", None, 0, [0.6, 0.6, 0.6]),
        basis_record("wrong", None, 0, [0.5, 0.5, 0.5]),
        basis_record("adapted", None, 0, [0.1, 0.2, 0.4]),
    ]
    (tmp_path / "records").mkdir()
    for number, each in enumerate(records):
        (tmp_path / "records" / f"{number}.json").write_text(json.dumps(each))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{basis_tables.BEGIN}\nold\n{basis_tables.END}\nafter\n")
    text = basis_tables.write_tables(tmp_path, page)
    results = json.loads((tmp_path / "results.json").read_text())
    shown = results["methods"]["basis"]
    assert (shown["rate"], shown["seeds"], shown["parameters"]) == (0.002, [0, 1], 77)
    assert shown["scores"]["held_out_tasks"]["lpips"]["mean"] == pytest.approx(0.3)
    [lpips] = [
        each
        for each in results["differences"]
        if tuple(each.values())[:4] == ("lora_nr", "basis", "held_out_tasks", "lpips")
    ]
    # Seed 0 alone, which both have: 0.1, −0.1, 0.1, so that the LoRA has the smaller error on one task of three.
    assert (
        lpips["seeds"] == [0] and lpips["mean"] == pytest.approx(0.1 / 3) and lpips["tasks_won"] == pytest.approx(1 / 3)
    )
    [pair] = [
        each
        for each in results["differences"]
        if tuple(each.values())[:4] == ("lora_nr", "adapted", "held_out_tasks", "lpips")
    ]
    assert pair["mean"] == pytest.approx(0.1) and pair["tasks_won"] == 1 / 6
    assert "one LoRA of rank N·r − basis, coefficients adapted to the pair" in text
    assert "one LoRA of rank N·r − basis |" in text and "2.5, 3.0, 9.0 of 16" in text and "Unseen tasks (3)" in text
    # A group of which nothing was run but what the main comparison has is left out.
    titles = {name: f"### {group.title}" in text for name, group in basis_methods.GROUPS.items()}
    assert {name for name, there in titles.items() if there} == {"main", "listening", "mixes"}
    assert page.read_text().startswith("before") and page.read_text().endswith("after\n") and text in page.read_text()
    # A bar for each task; what was sampled isn't there, so there is no sheet.
    assert basis_pictures.differences_by_task(shown["per_task"], results["methods"]["lora_nr"]["per_task"]) == {
        task: [pytest.approx(value)] for task, value in {"task0": -0.1, "task1": 0.1, "task2": -0.1}.items()
    }
    assert (tmp_path / "tasks.png").is_file() and (tmp_path / "page_tasks.webp").is_file()
    assert not (tmp_path / "unseen.png").exists()
    # Strength 0.5 was measured with seed 1 alone, the base with seed 0 alone: no seed has all.
    half = basis_record("strength_05", None, 1, [0.4, 0.5, 0.6])
    assert not basis_pictures.by_strength(basis_tables.figures([*records, half])["methods"], "basis")
    strengths = basis_pictures.by_strength(
        basis_tables.figures([*records, half, basis_record("base", None, 1, [0.7, 0.7, 0.7])])["methods"], "basis"
    )
    drawings = {strength: of["held_out_tasks"] for strength, of in strengths.items()}
    assert list(drawings) == [0, 0.5, 1] and drawings[0.5]["lpips"] == pytest.approx(0.5)
    assert [drawings[s]["lpips_b"] for s in drawings] == pytest.approx([1.4, 1, 0.6])
    assert basis_pictures.plot_strengths(strengths).ndim == 3
    page.write_text("no marks")
    with pytest.raises(UserError, match="between which the tables go"):
        basis_tables.write_tables(tmp_path, page)
