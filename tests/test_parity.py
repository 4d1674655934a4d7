"""tools/check_parity.py on the golden data, on parts of it, and on damaged and foreign files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from golden import golden_dir
from test_router import formula

from lorweb_jax.adapters.basis import Basis, BasisConfig, LayerShape
from lorweb_jax.adapters.formats.basis_file import network_from_config, write_basis
from lorweb_jax.common.errors import UserError
from parity.check import check_folder
from parity.report import COEFFICIENT, EXACT, LEVEL, Comparison, errors

TOOL = Path(__file__).parent.parent / "tools" / "check_parity.py"


def tool(*arguments) -> subprocess.CompletedProcess:
    # Compiled without optimisation, which takes longer than what is computed.
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, env=environment)


def copied(folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copy(golden_dir() / name, folder / name)
    return folder


def changed(path: Path, key: str, change) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    arrays[key] = change(arrays[key])
    np.savez(path, **arrays)


@pytest.fixture
def checked(capsys):
    """check_folder's exit status and lines."""

    def check(folder):
        status = check_folder(folder)
        return status, capsys.readouterr().out.splitlines()

    return check


def test_golden_data_pass():
    done = tool(golden_dir())
    lines = done.stdout.splitlines()
    assert done.returncode == 0, [line for line in lines if "FAIL" in line] or done.stderr
    assert lines[-1] == "331 passed, 0 failed"
    kinds = {line.split()[0] for line in lines[:-1] if line.endswith(" ok")}
    assert kinds == {
        "basis_a:",
        "basis_a_fp16:",
        "basis_c:",
        "basis_e:",
        "grid",
        "scheduler",
        "external_query",
        "case_a",
        "case_c",
        "case_e",
        "train_step",
        "e2e_square",
    }
    held = {(line.split()[0], line.split(" tol ")[1].split()[0]) for line in lines if " mix/" in line}
    assert held == {("case_a", "1e-06"), ("case_c", "1e-06"), ("case_e", "1e-05")}
    assert "not checked" not in done.stdout
    assert all("external_query" in line or "loss weighting" in line for line in lines if "deviates" in line)


def test_recordings_of_pair_customization_pass(tmp_path, checked, quick_compiles):
    """With the models beside the folder; and a changed number is seen. (test_stylize.py begins from strings.)"""
    shutil.copytree(golden_dir() / "pair", tmp_path / "pair", ignore=shutil.ignore_patterns("e2e_*"))
    (tmp_path / "tiny_pipeline").symlink_to(golden_dir() / "tiny_pipeline")
    status, lines = checked(tmp_path / "pair")
    assert status == 0, [line for line in lines if "FAIL" in line]
    kinds = {line.split()[0] for line in lines[:-1] if line.endswith(" ok")}
    files = {f"{name}.safetensors" for name in ("content_a", "content_d", "style_a", "style_b", "style_d")}
    assert kinds == {"qr", "augment", "schedule", "forward_d", "train_b", "sample_two"} | files
    for name, key in (("forward_d", "cond/both"), ("augment", "2/style")):
        for copied in ("cases.json", f"{name}.npz", "content_d.safetensors", "style_d.safetensors"):
            shutil.copy(golden_dir() / "pair" / copied, tmp_path / copied)
        changed(tmp_path / f"{name}.npz", key, lambda array: array + np.float32(1e-3) * np.abs(array).max())
        status = check_folder(tmp_path, golden_dir() / "tiny_pipeline")
        assert status == 1
        (tmp_path / f"{name}.npz").unlink()


def test_help_and_missing_folder(tmp_path):
    done = tool("--help")
    assert done.returncode == 0 and "relative error" in done.stdout and "--pipeline" in done.stdout
    done = tool(tmp_path / "absent")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_an_empty_folder_fails(tmp_path, checked):
    status, lines = checked(tmp_path)
    assert status == 1 and lines[-1] == "0 passed, 0 failed" and "holds no recordings" in lines[0]
    with pytest.raises(UserError, match="not a folder"):
        check_folder(tmp_path, tmp_path / "absent")


@pytest.mark.parametrize(
    "names,passed,not_checked",
    [
        (["grid.npz"], 8, []),
        (["scheduler.npz"], 48, []),
        (["train_step.npz"], 10, ["noise_pred", "B2/grad/"]),
        (["e2e_square.npz"], 23, ["pooled_prompt_embeds", "step0/transformer_out", "vae_decode_out", "external_query"]),
        (["external_query.npz"], 0, ["external_query"]),
        (["case_c.npz"], 0, ["output", "mix/"]),
        (["case_c.npz", "configs.json", "basis_c.safetensors"], 47, ["base_output"]),
        (["configs.json", "basis_a_fp16.safetensors"], 1, []),
        (["basis_c.safetensors", "case_c.npz"], 0, ["basis_c", "mix/"]),
    ],
)
def test_file_sets_alone(names, passed, not_checked, tmp_path, checked):
    """Without models or bases, what needs none is checked, and a line says what the rest needs."""
    status, lines = checked(copied(tmp_path, *names))
    assert lines[-1] == f"{passed} passed, 0 failed" and status == int(passed == 0)
    for part in not_checked:
        assert any(part in line and "not checked: " in line for line in lines), part


def one_bit_off(grid):
    return grid ^ (np.arange(grid.size) == 5).reshape(grid.shape)


def test_wrong_numbers_fail(tmp_path, checked):
    copied(tmp_path, "grid.npz", "scheduler.npz")
    changed(tmp_path / "grid.npz", "square/grid_max64", one_bit_off)
    changed(tmp_path / "scheduler.npz", "n4_L64/sigmas", lambda sigmas: sigmas * np.float32(1 + 1e-5))
    changed(tmp_path / "scheduler.npz", "n28_L64/sigmas", lambda sigmas: sigmas[:-1])
    changed(tmp_path / "scheduler.npz", "step/x1", lambda x: x * np.nan)
    status, lines = checked(tmp_path)
    failed = [line for line in lines if "FAIL" in line]
    assert status == 1 and lines[-1].endswith(" passed, 5 failed")
    for part in ("square/grid_max64", "n4_L64/sigmas", "n28_L64/sigmas", "step/x1", "step/x2"):
        assert sum(part in line for line in failed) == 1, part
    assert any("ours has the shape [29], theirs [28]" in line for line in failed)


def test_bad_files_are_one_line_each(tmp_path, checked):
    copied(tmp_path, "grid.npz", "case_c.npz", "configs.json", "basis_c.safetensors")
    for name in ("case_c.npz", "basis_c.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:30_000])
    (tmp_path / "train_step.npz").write_bytes(b"not a zip file")
    np.savez(tmp_path / "e2e_objects.npz", prompt=np.array([{}], dtype=object))
    np.savez(tmp_path / "scheduler.npz", something=np.zeros(3))
    status, lines = checked(tmp_path)
    assert status == 1 and lines[-1] == "8 passed, 5 failed"
    for name in ("basis_c", "case_c.npz", "train_step.npz", "e2e_objects.npz", "scheduler.npz"):
        assert sum(line.startswith(name) and "FAIL: " in line for line in lines) == 1, name
    (tmp_path / "configs.json").write_text("[")
    assert any(line.startswith("configs.json") and "FAIL: " in line for line in checked(tmp_path)[1])


def test_any_case_name_and_mode(tmp_path, checked):
    """Recordings made with the router's formula: no projection, tanh, two heads, summed."""
    config = BasisConfig(
        size=3,
        rank=2,
        key_dim=6,
        heads=2,
        activation="tanh",
        reduction="sum",
        projection="none",
        query_mode="ca'-ca",
        query_dim=6,
    )
    layers = {
        "transformer_blocks.attn.to_out_0": LayerShape(2, 4, 4),
        "single_transformer_blocks.proj_mlp": LayerShape(1, 4, 16),
    }
    arrays = Basis(config, layers, rngs=nnx.Rngs(0)).to_arrays()
    write_basis(tmp_path / "basis_other name.safetensors", config, arrays)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "configs.json").write_text(json.dumps({"other name": network_from_config(config)}))
    query = np.random.default_rng(0).normal(size=(2, 1, 6)).astype(np.float32)
    names = {
        "transformer_blocks.1.attn.to_out.0": ("transformer_blocks.attn.to_out_0", 1),
        "single_transformer_blocks.0.proj_mlp": ("single_transformer_blocks.proj_mlp", 0),
    }
    mixes = {
        f"mix/{name}": np.stack(
            [formula(example[0], np.asarray(arrays[path]["keys"][block]), None, 2, "tanh", "sum") for example in query]
        )
        for name, (path, block) in names.items()
    }
    np.savez(tmp_path / "case_other name.npz", external_query=query, **mixes)
    status, lines = checked(tmp_path)
    assert (status, lines[-1]) == (0, "3 passed, 0 failed"), lines
    other = network_from_config(config)
    other["network_kwargs"]["mixing_coeffs_type"] = "mean"
    (tmp_path / "configs.json").write_text(json.dumps({"other name": other}))
    assert checked(tmp_path)[1][-1] == "1 passed, 2 failed"


def test_errors_are_those_that_the_help_states():
    assert errors([3.0, 4.5], [3.0, 4.0]) == (0.5, 0.1)
    assert errors([0.0], [0.0]) == (0.0, 0.0) and errors([1e-9], [0.0])[1] == np.inf
    lines = []
    report = Comparison(lines.append)
    report.compare("coefficients", lambda: np.array([1 + 9e-7]), np.array([1.0]), COEFFICIENT)
    report.compare("image", lambda: np.array([7, 9], np.uint8), np.array([8, 9], np.uint8), LEVEL)
    report.compare("ids", lambda: np.array([7]), np.array([8]), EXACT)
    report.compare("no numbers", lambda: np.array([7]), np.array(["x"]), EXACT)
    assert (report.passed, report.failed) == (2, 2) and report.summary() == 1
    assert [line.split()[-1] for line in lines[:3]] == ["ok", "ok", "FAIL"]
