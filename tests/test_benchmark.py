"""tools/benchmark.py: FLOPs against independent counts, every row at the smallest size, and the command itself.

Nothing here asserts a time.
"""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from lorweb_jax.basis.basis import Basis, BasisParam
from lorweb_jax.benchmark import flops, ours
from lorweb_jax.benchmark.run import measure, ratios, summarise
from lorweb_jax.benchmark.setting import SIZES, Setting
from lorweb_jax.errors import UserError
from lorweb_jax.transformer.flux import Flux, FluxConfig, block_linears

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "tools" / "benchmark.py"
# A batch of 2, and numbers of tokens that no other size equals.
TINY = Setting(size="tiny", what="train", dtype="float32", tokens=12, text_tokens=5, batch=2, repeats=1, basis_size=3,
               basis_rank=2, remat="none", unroll=1, attention="xla", threads=1)


def dots(jaxpr) -> int:
    """FLOPs of all matrix products of a jaxpr, those of scanned bodies as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(dots(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


def trace(kind: str, setting: Setting) -> int:
    """FLOPs of the products in the functions that the benchmark compiles."""
    fluxdef, state = nnx.split(nnx.eval_shape(lambda: Flux(setting.model, rngs=nnx.Rngs(0))))
    basisdef, trainable = nnx.split(nnx.eval_shape(
        lambda: Basis(setting.basis, block_linears(setting.model), rngs=nnx.Rngs(0))), BasisParam)
    given = jax.eval_shape(lambda: ours.inputs(setting))
    if kind in ("weights", "inputs"):
        return products(ours.gradients(kind, fluxdef), state, given)
    if kind == "basis":
        opt_state = jax.eval_shape(ours.OPTIMIZER.init, trainable)
        return products(ours.train_step(fluxdef, basisdef, ours.OPTIMIZER), trainable, opt_state, state, given)

    def forward(state, trainable, given):
        basis = nnx.merge(basisdef, trainable)
        additions = basis.additions(basis.coefficients(given["query"])) if kind == "low-rank" else None
        return ours.loss(nnx.merge(fluxdef, state), given, additions)

    return products(forward, state, trainable, given)


def products(function, *arguments) -> int:
    return dots(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize("kind", ["forward", "weights", "inputs", "basis"])
def test_flops_equal_those_of_the_traced_products(kind):
    counted = flops.base_flops(kind, TINY.model, TINY.batch, TINY.tokens, TINY.text_tokens)
    if kind == "basis":
        counted += flops.basis_flops(kind, TINY)
    assert counted == trace(kind, TINY)


def test_low_rank_flops_equal_those_of_the_traced_products():
    router = sum(2 * shape.depth * TINY.batch * TINY.basis.key_dim * (TINY.basis.query_dim + TINY.basis_size)
                 for shape in block_linears(TINY.model).values())
    counted = flops.base_flops("forward", TINY.model, TINY.batch, TINY.tokens, TINY.text_tokens)
    assert counted + flops.basis_flops("forward", TINY) + router == trace("low-rank", TINY)


@pytest.mark.parametrize("tokens, text, teraflop", [(8192, 512, 165.5), (2048, 512, 37.7)])
def test_flops_of_the_real_model(tokens, text, teraflop):
    """method.md §1: linear layers 2·57·12·d² a token, attention 57·4·L²·d; the figures of the published sizes."""
    config, length = SIZES["kontext"], tokens + text
    counted = flops.base_flops("forward", config, 1, tokens, text)
    by_hand = 2 * 57 * 12 * config.features ** 2 * length + 57 * 4 * length ** 2 * config.features
    # Modulation, embedders and the last layer are not in the formula by hand.
    assert counted == pytest.approx(by_hand, rel=2e-3)
    assert counted == pytest.approx(teraflop * 1e12, rel=2e-3)


def test_flops_agree_with_the_compilers_count():
    """Within 3 %: the compiler counts elementwise work too."""
    config = FluxConfig(num_layers=1, num_single_layers=1, num_attention_heads=4, joint_attention_dim=64)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0))))
    given = jax.eval_shape(lambda: {
        "hidden_bsc": jnp.zeros((1, 64, config.in_channels)), "text_btj": jnp.zeros((1, 32, 64)),
        "pooled_bp": jnp.zeros((1, config.pooled_projection_dim)), "timestep_b": jnp.zeros(1),
        "guidance_b": jnp.zeros(1), "image_ids_s3": jnp.zeros((64, 3)), "text_ids_t3": jnp.zeros((32, 3))})
    lowered = jax.jit(lambda state, given: nnx.merge(graphdef, state)(**given)).lower(state, given)
    assert flops.base_flops("forward", config, 1, 64, 32) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.03)


def test_train_step_runs():
    step = ours.make_step("basis", TINY)
    step.run(2)
    assert step.compile_seconds > 0


def test_diffusers_row_has_the_same_model():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from lorweb_jax.benchmark import theirs

    threads = torch.get_num_threads()
    theirs.make_step("eager", TINY, "cpu").run(1)
    torch.set_num_threads(threads)
    model = diffusers.FluxTransformer2DModel(**dataclasses.asdict(TINY.model))
    state = nnx.state(nnx.eval_shape(lambda: Flux(TINY.model, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(weight.numel() for weight in model.parameters())


def test_a_row_that_fails_says_why():
    row = {"row": "base", "name": "ours", "seconds": []}
    measure({"base": row}, dataclasses.replace(TINY, what="sample", dtype="float31"), "cpu", interleaved=True)
    summarise(row, 1.0)
    assert "float31" in row["skipped"] and "\n" not in row["skipped"]


def test_drift_does_not_reach_the_ratios():
    drift = [1.0, 2.0, 5.0]
    rows = {name: {"seconds": [factor * seconds for factor in drift]}
            for name, seconds in (("base", 2.0), ("low-rank", 2.1), ("eager", 4.0))}
    rows["folded"] = {"skipped": "no memory", "seconds": []}
    assert ratios(rows, "sample", True) == pytest.approx({"low-rank/base": 1.05, "base/eager": 0.5})


def test_command(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, COMMAND, "--no-torch", "--repeats=2", "--unroll=1", "--threads=1", f"--json={path}"],
        capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for text in ("ceilings: matmul", "ours + basis, low-rank", "of the time of ours", "folding took"):
        assert text in done.stdout
    result = json.loads(path.read_text())
    assert result["setting"]["tokens"] == 32 and result["machine"]["threads"] == 1
    assert min(result["ceilings"]["matmul"], result["ceilings"]["copy"]) > 0
    assert [row["row"] for row in result["rows"]] == ["base", "low-rank", "folded"]
    for row in result["rows"]:
        assert len(row["seconds"]) == 2 and row["compile_seconds"] > 0 and row["peak_bytes"] > 0
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median_seconds"])
    assert set(result["ratios"]) == {"low-rank/base", "folded/base"}


@pytest.mark.parametrize("arguments", [
    ["--size=huge"], ["--tokens=7"], ["--repeats=0"], ["--batch=x"], ["--threads=4096"], ["--remat=full"],
    ["--attention=cudnn"], ["--json=/nowhere/at/all.json"], ["--nonsense"]])
def test_bad_arguments_are_one_sentence(arguments, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_command", COMMAND)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(UserError) as caught:
        command.main()
    assert caught.value.code == 2 and "\n" not in str(caught.value)


def test_needs_only_what_gpu_machines_have():
    absent = ("PIL", "grain", "clu", "ml_collections", "transformers", "tokenizers", "tensorboardX", "torch",
              "diffusers", "resvg_py")
    modules = ", ".join(f"lorweb_jax.benchmark.{name}" for name in ("run", "table", "ours", "ceilings", "worker"))
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {modules}, lorweb_jax.flow.sampling"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
