"""The basis's training job on the small base: what is trained, what it starts from, what a run leaves."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from lorweb_jax.basis.basis import BasisConfig
from lorweb_jax.errors import UserError
from lorweb_jax.layers import Weight
from lorweb_jax.training.jobs.basis import BasisJob
from lorweb_jax.weights.adapters import load_basis
from lorweb_jax.weights.basis_file import read_basis
from lorweb_jax.weights.pipeline_folder import PipelineFolder
from lorweb_jax.weights.state import shapes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with its evaluation, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [sys.executable, "-m", "lorweb_jax.main", f"--config={ROOT}/configs/basis.py:smoke",
         f"--config.pipeline={ROOT}/assets/small_kontext", f"--config.data.cache={folder}/data",
         f"--workdir={folder}/run"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


def test_run_leaves_pictures_tables_and_a_basis(run):
    folder, printed = run
    assert "step 4/4" in printed and "base, text only" in printed
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        f"{name}_000004.png" for name in ("train", "held_out_drawings", "held_out_tasks", "router")}
    for split in ("held_out_drawings", "held_out_tasks"):
        table = json.loads((folder / "evaluation" / split / "table.json").read_text())
        assert {"copy b", "base, text only", "basis"} <= set(table["rows"])
        assert (folder / "evaluation" / split / "sheet.png").exists()


def test_training_is_compared(run, tmp_path, monkeypatch, capsys):
    """Two steps as the config is and two with moments in 8 bit, from the same start; a field that isn't there."""
    tool = runpy.run_path(str(ROOT / "tools" / "compare_training.py"))
    (tmp_path / "config.py").write_text(f"""
import runpy
def get_config():
    config = runpy.run_path({str(ROOT / "configs" / "basis.py")!r})["get_config"]("smoke")
    config.pipeline, config.data.cache = {str(ROOT / "assets" / "small_kontext")!r}, {str(run[0].parent / "data")!r}
    return config
""")

    def compare(*options):
        monkeypatch.setattr(sys, "argv", ["compare_training.py", f"--config={tmp_path}/config.py", "--steps=2",
                                          "--batch=2", *options])
        tool["main"]()
        return [line.split() for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setitem(tool["main"].__globals__, "HELD_OUT_BATCHES", 1)
    _, head, plain, small = compare("optimizer.moments=int8")
    assert head[:3] == ["training", "held_out_drawings", "held_out_tasks"]
    assert plain[:3] == ["as", "it", "is"] and small[0] == "optimizer.moments=int8"
    # The first update takes no moments from before, so that both second losses are nearly the same.
    for one, other in zip(map(float, plain[3:6]), map(float, small[1:4])):
        assert 0.01 < one < 10 and one == pytest.approx(other, rel=1e-2)
    assert any("int8" in word for word in small[4:]) and not any("int8" in word for word in plain)
    for option, message in (("optimizer.moment=int8", "optimizer.moments"), ("seed=one", "'one' is no value"),
                            ("data.task_balanced=false", "'false' is no value for config.data.task_balanced")):
        with pytest.raises(UserError, match=message) as told:
            compare(option)
        assert told.value.code == 2


def test_exported_basis_is_the_checkpoints(run):
    """float16 of what the newest checkpoint holds, and the router's config with it."""
    folder, _ = run
    layers = {path: (parts["a"].shape[0], parts["a"].shape[2], parts["b"].shape[3])
              for path, parts in read_basis(folder / "export" / "basis.safetensors")[1].items()}
    config, trained = load_basis(folder, layers)
    exported_config, exported = read_basis(folder / "export" / "basis.safetensors")
    assert (config.size, config.rank, config.query_mode) == (4, 4, "cat-aa'b") and exported_config.size == 4
    for path, parts in trained.items():
        for name, array in parts.items():
            np.testing.assert_array_equal(exported[path][name], array.astype(np.float16))


def test_only_the_basis_is_trained():
    """Every Variable of the model is either a part of the basis or a frozen weight."""
    folder = PipelineFolder(ROOT / "assets" / "small_kontext")

    def names(*kind):
        return shapes(lambda: folder.make(nnx.Rngs(0), BasisConfig(size=4, query_dim=None)), *kind).keys()

    trained, frozen = names(BasisJob.trainable), names(Weight)
    assert trained and all(name.startswith("basis.layers.") for name in trained)
    assert not any(name.startswith("basis.") for name in frozen)
    assert trained | frozen == names()
