"""notebooks/analogies.ipynb, executed as Jupyter does, on runs of two steps."""

import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lorweb_jax import write_image
from lorweb_jax.adapters.formats.mix_file import read_mix
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.folder import model_layers

nbformat = pytest.importorskip("nbformat", reason="nbformat, which nbclient needs, is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient, of the extra [test], is not installed")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "analogies.ipynb"
# In the notebook, after its last cell.
CHECKS = """
np.testing.assert_array_equal(path["0"], result)  # the session's edit is the pipeline's
assert np.abs(again.astype(int) - result.astype(int)).max() <= 1  # the LoRA's sum is in another order
for one, other in ((result, weaker[0]), (path["0"], path["1"]), (drawn[0], drawn[3])):
    assert (one != other).any()
assert [task for task, _ in place.nearest] in (["red", "mirror"], ["mirror", "red"])
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_the_notebook_is_kept_without_results(notebook):
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    words = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", words)
    assert len(links) > 3 and all((NOTEBOOK.parent / link).exists() for link in links)


def pictures(folder):
    """Two tasks of three pairs, in folders: made redder, and mirrored; (content, style), paths of a pair."""
    random = np.random.default_rng(1)
    for task, change in (("red", lambda x: np.maximum(x, [255, 0, 0])), ("mirror", lambda x: x[:, ::-1])):
        for number in range(3):
            before = random.integers(0, 256, (32, 32, 3), np.uint8)
            for part, image in (("before", before), ("after", change(before).astype(np.uint8))):
                write_image(folder / "data" / task / part / f"{number}.png", image)
    return [str(folder / "data" / "red" / part / "0.png") for part in ("before", "after")]


def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    content, style = pictures(tmp_path)
    short = {"train.batch": 2, "optimizer.learning_rate": 0.05, "unroll": 1, "unstacked": False}
    short |= {f"train.{name}": 2 for name in ("steps", "log_every", "checkpoint_every", "log_images_every")}
    changes = {
        "basis": short
        | {"basis.size": 3, "basis.scale": 3.0, "basis.key_dim": 8}
        | {"data.root": str(tmp_path / "data"), "data.quadrant_size": 32}
        | {"optimizer.warmup": 0, "evaluation.tasks": 0, "evaluation.per_task": 0},
        "pair": short
        | {"data.content": content, "data.style": style, "data.long_edge": 32, "pair.style_start": 0}
        | {"pair.double_content": "none", "pair.single_content": "none"}
        | {"pair.content_rank": 2, "pair.style_rank": 2, "evaluation.batch": 2, "evaluation.steps": 1},
    }
    [number] = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    values = f"RUNS, STEPS, CHANGES = Path({str(tmp_path / 'runs')!r}), 2, {changes!r}"
    notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(values))
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # the kernel compiles much and computes little
    if version("jaxlib") < "0.11":  # newer ones don't know it
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", ())
    ]
    assert len(figures) == 8

    out = tmp_path / "runs" / "notebook"
    saved, lora = (
        read_mix(out / "blue_frame_mix.safetensors"),
        safetensors.numpy.load_file(out / "blue_frame.safetensors"),
    )
    assert saved.prompt == "put a frame around it"
    config, arrays = load_basis(tmp_path / "runs" / "basis", model_layers(ROOT / "assets" / "small_kontext"))
    for path in ("transformer_blocks.attn.to_q", "single_transformer_blocks.proj_out"):
        stack, _, layer = path.partition(".")
        name = f"transformer.{stack}.1.{layer}"
        c, a, b = (values[1] for values in (saved.mix.coefficients[path], arrays[path]["a"], arrays[path]["b"]))
        update = config.scale * np.einsum("n,nir,nro->oi", c, a, b)
        made = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(made, update, rtol=0, atol=1e-5 * np.abs(update).max())
    assert Checkpoint(out / "style.safetensors").metadata["style_words"] == "in black lines"
