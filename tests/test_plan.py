"""lorweb_jax.plan: sizes and products against counts by hand, collectives of programs whose traffic is known, and the
command for GPUs. What needs the TPU compiler is skipped where libtpu isn't installed.
"""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.pair import Augmentation
from lorweb_jax.jobs.pair import PairBatches
from lorweb_jax.main import read_config
from lorweb_jax.nn import sharding
from lorweb_jax.pipeline.published import KontextSizes
from lorweb_jax.planning import collectives, estimated_time, gpu_compiler, remat, report, suggest, tpu_time
from lorweb_jax.planning.activations import estimate, kept_bytes
from lorweb_jax.planning.chips import GPUS
from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.compiled import compile_program
from lorweb_jax.planning.figures import make_plan
from lorweb_jax.planning.program import Part, Program
from lorweb_jax.planning.shapes import batch_shapes, planned_job
from lorweb_jax.planning.topology import target
from lorweb_jax.planning.work import products
from lorweb_jax.processes import compiler_flags
from lorweb_jax.training.state import count
from lorweb_jax.training.step import numeric

ROOT = Path(__file__).parents[1]


def smoke(**changes):
    config = read_config(str(ROOT / "configs" / "basis.py") + ":smoke")
    config.pipeline = str(ROOT / "assets" / "small_kontext")
    config.update_from_flattened_dict({"mesh.fsdp": 1, "precomputed": "elsewhere", "unstacked": False, **changes})
    return config


@pytest.fixture(scope="module", autouse=True)
def no_gpu_compiler():
    """Plans for GPUs are estimates here, whatever is installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_compiler, "installed", lambda: False)
        yield


@pytest.fixture(scope="module")
def gpu_plan(no_gpu_compiler):
    """Without encoders, which take seconds to trace."""
    return make_plan(smoke(), target("gpu:h100"), "train")


HLO = """
%double (p.1: f32[8,64]) -> f32[8,64] {
  ROOT %inside = f32[8,64]{1,0} all-reduce(%p.1), replica_groups={{0,1,2,3}}, to_apply=%add
}

%body (p.2: (s32[], f32[8,64])) -> (s32[], f32[8,64]) {
  %counter = s32[] get-tuple-element(%p.2), index=0
  %two = s32[] constant(2)
  %ag = (bf16[2,64]{1,0:T(8,128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %ag.done = bf16[8,64]{1,0} all-gather-done(%ag)
  %rs = f32[2,64]{1,0} reduce-scatter(%y), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %cp = (f32[8,64], f32[8,64], u32[], u32[]) collective-permute-start(%z), source_target_pairs={{0,1},{1,0}}
  %next = s32[] add(%counter, %two)
  ROOT %out = (s32[], f32[8,64]) tuple(%next, %rs)
}

%condition (p.3: (s32[], f32[8,64])) -> pred[] {
  %at = s32[] get-tuple-element(%p.3), index=0
  %limit = s32[] constant(6)
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}

%fused.1 (p.5: bf16[2,64]) -> bf16[8,64] {
  %started = bf16[8,64]{1,0} all-gather(%p.5), channel_id=5, \
replica_groups=[2,4]<=[8], backend_config={"async_collective_fusion_config":{}}
  ROOT %state.1 = bf16[8,64]{1,0} custom-call(%started), custom_call_target="AsyncCollectiveStart"
}

%fused.2 (p.6: bf16[2,64]) -> bf16[8,64] {
  %goes.on = bf16[8,64]{1,0} all-gather(%p.6), channel_id=5, \
replica_groups=[2,4]<=[8], backend_config={"async_collective_fusion_config":{}}
  ROOT %state.2 = bf16[8,64]{1,0} custom-call(%goes.on), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p.4: f32[8,64]) -> f32[8,64] {
  %begin = bf16[8,64]{1,0} fusion(%w), kind=kCustom, calls=%fused.1
  %end = bf16[8,64]{1,0} fusion(%begin), kind=kCustom, calls=%fused.2
  %loop = (s32[], f32[8,64]) while(%start), condition=%condition, body=%body
  %a2a = (f32[4,64], f32[4,64]) all-to-all(%a, %b), replica_groups={{0,1},{2,3}}
  %a2a.s = ((bf16[4,64]{1,0}), bf16[4,64]{1,0}) all-to-all-start(%c), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %called = f32[8,64]{1,0} call(%p.4), to_apply=%double
}
"""


def test_collectives_of_hlo_text():
    """Bytes by the ring formulas of collectives.py; the loop runs from 0 by 2 to 6: 3 times."""
    assert collectives.traffic(HLO, 8) == {
        "all-gather": Traffic(4, 4 * 8 * 64 * 2 * 3 / 4),
        "reduce-scatter": Traffic(3, 3 * 2 * 64 * 4 * 3),
        "all-reduce": Traffic(1, 2 * 8 * 64 * 4 * 3 / 4),
        "all-to-all": Traffic(2, 2 * 4 * 64 * 4 / 2 + 4 * 64 * 2 / 2),
        "collective-permute": Traffic(3, 3 * 8 * 64 * 4),
    }


@pytest.mark.parametrize("version", ["0.10.2", "0.12.0"])
def test_collectives_as_versions_of_jax_write_them(version):
    """The program of test_collectives_of_a_tpu_program, recorded: what ROOT, while and collectives lead to of the text
    of the TPU compiler. Newer text names parts of tuples in place, and groups by the mesh's axes."""
    text = (Path(__file__).parent / "hlo" / f"scan_jax_{version}.txt").read_text()
    assert ("#0" in text) == (version == "0.12.0")
    weight, part = 512 * 512 * 2, 256 * 512 * 4
    expected = {
        "all-gather": Traffic(5, 5 * weight * 3 / 4),
        "reduce-scatter": Traffic(5, 5 * part * 3 / 4),
        "all-reduce": Traffic(1, 2 * part * 3 / 4),
    }
    assert collectives.traffic(text, 4) == expected
    # A loop of which nothing is known counts once, and what is in it is marked.
    unknown = collectives.traffic(text.replace("direction=LT", "direction=GT"), 4)
    assert unknown == {
        "all-gather": Traffic(1, weight * 3 / 4, True),
        "reduce-scatter": Traffic(1, part * 3 / 4, True),
        "all-reduce": expected["all-reduce"],
    }


def program(function, mesh, *arguments):
    return Program("train", None, mesh, (Part(jax.jit(function), arguments),), {}, {}, 1, 1)


def test_collectives_of_a_tpu_program():
    """Gather a weight and scatter a gradient in each of 5 steps of a scan, then one sum, on 2 x 2 chips."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    there = target("v5e:2x2")
    mesh = Mesh(np.array(there.devices), ("x",))

    def local(w, x):
        def step(x, _):
            whole = jax.lax.all_gather(w, "x", tiled=True)
            y = jnp.tanh(x @ whole.astype(jnp.float32))
            return y + jax.lax.psum_scatter(y, "x", tiled=True).mean(), None

        return jax.lax.psum(jax.lax.scan(step, x, length=5)[0], "x")

    w, x = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P("x")))
        for shape, dtype in (((512, 512), jnp.bfloat16), ((1024, 512), jnp.float32))
    )
    made = program(jax.shard_map(local, mesh=mesh, in_specs=(P("x"), P("x")), out_specs=P()), mesh, w, x)
    compiled = compile_program(made, made.traced(), there)
    found = compiled.traffic
    assert compiled.fits and compiled.arguments == (512 * 512 * 2 + 1024 * 512 * 4) // 4
    assert found["all-gather"].sent == 5 * 512 * 512 * 2 * 3 / 4
    scattered = 5 * 256 * 512 * 4 * 3 / 4
    assert found["reduce-scatter"].sent == scattered and found["all-reduce"].sent == 2 * 256 * 512 * 4 * 3 / 4
    rows = estimated_time.costs(*compiled.schedules, there.chip, 4, tpu_time.model)
    assert {cost.times for cost in rows if cost.kind == "products"} == {5}
    waited = sum(cost.seconds for cost in rows if cost.kind == estimated_time.COLLECTIVES)
    assert 0 < waited <= sum(kind.sent for kind in found.values()) / there.chip.interconnect
    assert f"test_plan.py:{local.__code__.co_firstlineno + 3}" in {Path(cost.place).name for cost in rows}


def test_too_little_memory_on_a_tpu_is_told():
    """Two arguments and the sum of 6.4 GB each; a v5e has 15.75 GiB for programs."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed")
    there = target("v5e:1x1")
    mesh = Mesh(np.array(there.devices), ("x",))
    x = jax.ShapeDtypeStruct((40_000, 40_000), jnp.float32, sharding=NamedSharding(mesh, P()))
    made = program(lambda x, y: x + y, mesh, x, x)
    compiled = compile_program(made, made.traced(), there)
    assert not compiled.fits and compiled.capacity == there.chip.memory
    assert compiled.needed == pytest.approx(3 * 40_000**2 * 4, rel=0.01)


def test_products():
    """A convolution of 3x3 from 2 to 5 channels at 4x6 places, and 7 times a product [3, 4] [4, 4]."""

    def f(image, kernel, x, w):
        y = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y.sum() + jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0].sum()

    arguments = [jnp.ones(shape) for shape in ((1, 4, 6, 2), (3, 3, 2, 5), (3, 4), (4, 4))]
    assert products(jax.make_jaxpr(f)(*arguments).jaxpr) == 2 * 4 * 6 * 9 * 2 * 5 + 7 * 2 * 3 * 4 * 4


def test_products_and_bytes_of_what_a_scan_stacks():
    """A carry [3, 4], and 7 times a stacked [3, 4], [5] and a number; what only an unwanted output needs isn't
    counted."""

    def f(x, w, v):
        def step(x, _):
            return x @ w, (x, jnp.arange(5.0), (x @ v).sum())

        return jax.lax.scan(step, x, length=7)

    made = jax.make_jaxpr(f)(*(jnp.ones(shape) for shape in ((3, 4), (4, 4), (4, 2)))).jaxpr
    assert kept_bytes(made, 99) == 7 * (3 * 4 + 5 + 1) * 4
    carried, looked = 7 * 2 * 3 * 4 * 4, 7 * 2 * 3 * 4 * 2
    assert products(made) == carried + looked and products(made, [True, False, False, False]) == carried


def test_batch_is_that_of_training():
    """Shapes and dtypes of what the job makes of a batch of its loader's."""
    job = planned_job(smoke(precomputed=""), "gpu")
    grids = np.zeros((4, 64, 64, 3), np.uint8)
    made = numeric(job.prepare({"condition": grids, "target": grids, "caption": ["blur it"] * 4}))
    expected = batch_shapes(job, sharding.make_mesh(job.config.mesh))
    assert {name: (value.shape, value.dtype) for name, value in made.items()} == {
        name: (shape.shape, shape.dtype) for name, shape in expected.items()
    }


def test_published_sizes():
    """Parameters of FLUX.1 Kontext's parts, with CLIP ViT-L/14 as the router's encoder, no file read."""
    made = nnx.eval_shape(lambda: KontextSizes("").make(nnx.Rngs(0)))
    counts = {
        name: sum(leaf.size for leaf in jax.tree.leaves(nnx.state(getattr(made, name))))
        for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    }
    assert counts == {
        "transformer": 11_901_408_320,
        "vae": 83_819_683,
        "text_encoder": 123_060_480,
        "text_encoder_2": 4_762_310_656,
        "image_encoder": 303_966_208,
    }


def test_bytes_from_shapes(gpu_plan):
    """All float32, one device: 4 bytes a parameter, twice that for two moments (and two counts)."""
    memory, groups = gpu_plan.memory, gpu_plan.program.groups
    assert memory["base"] == 4 * count(groups["base"]) and memory["basis"] == 4 * count(groups["basis"])
    assert 0 <= memory["optimizer"] - 2 * memory["basis"] <= 16 and memory["gradients"] == memory["basis"]
    assert gpu_plan.fits and gpu_plan.peak == sum(memory.values()) and gpu_plan.compiled is None
    assert "it fits" in report.table(gpu_plan)
    assert f"pip install --no-deps jax-cuda12-plugin=={jax.__version__} " in report.table(gpu_plan)
    assert json.loads(json.dumps(report.to_json(gpu_plan)))["memory"] == memory


def pair_smoke(**changes):
    config = read_config(str(ROOT / "configs" / "pair.py") + ":smoke")
    config.pipeline = str(ROOT / "assets" / "small_kontext")
    config.update_from_flattened_dict({"mesh.fsdp": 1, "data.condition": "x.png", **changes})
    return config


def test_a_pair_of_adapters():
    """Bytes from shapes, all float32; frozen A's have no moments. What each pass multiplies beyond the model is little
    without remat: both adapters' parts of a product's gradient, and the same A's in q, k and v."""
    plan = make_plan(pair_smoke(**{"train.batch": 4}), target("gpu:h100"), "train")
    groups, memory = plan.program.groups, plan.memory
    trained, frozen = (4 * count({k: v for k, v in groups["basis"].items() if k.endswith(".a") == at}) for at in (0, 1))
    assert memory["basis"] == trained + frozen and memory["gradients"] == trained and frozen
    assert 0 <= memory["optimizer"] - 2 * trained <= 16
    table = report.table(plan)
    assert "batch 4 in 2 parts, 32 + 20 tokens, 2 passes" in table and "adapters, trained" in table
    assert 0 <= plan.work.recomputed < 0.1 * plan.work.model
    # Shapes of what the job makes of its images, which a plan doesn't read.
    images = PairBatches(Augmentation([np.zeros((64, 64, 3), np.uint8)] * 3, 64), pair_smoke()).at(0)["images"]
    shape = batch_shapes(planned_job(pair_smoke(), "gpu"), sharding.make_mesh(pair_smoke().mesh))["images"]
    assert (images.shape, images.dtype) == (shape.shape, shape.dtype)


def test_pictures_of_a_pair():
    plan = make_plan(pair_smoke(), target("gpu:h100"), "sample")
    assert plan.fits and "the mix beside the weights" in report.table(plan)


def test_suggestions_fit(gpu_plan):
    """With too little memory, each change that is offered makes the plan fit; the flags are options of the command."""
    plan = dataclasses.replace(gpu_plan, capacity=0.9 * gpu_plan.peak)
    estimator = suggest.Estimator(smoke(), plan)
    changes = suggest.suggestions(estimator)
    assert not plan.fits and {"remat": "full"} in [change.values for change in changes]
    changed = make_plan(smoke(**changes[-1].values), plan.target, "train")
    assert changed.peak == pytest.approx(changes[-1].peak, rel=0.05)
    for change in changes:
        assert change.peak <= plan.capacity and re.fullmatch(r"(--config\.[a-z_.]+=[\w/]+ ?)+", change.flags())


def test_streamed_blocks(gpu_plan):
    """The blocks' kernels are no longer on the device, but for one block of the larger kind; they are read forward and
    backward, the modulations' forward alone."""
    there, streams = target("gpu:rtx3060"), {"offload": "blocks", "remat": "full"}
    plain, plan = (make_plan(smoke(**changes), there, "train") for changes in ({"remat": "full"}, streams))
    base, record = plain.program.groups["base"], plain.program.job.folder.backbone
    stacks = tuple(f"transformer.{path}." for path, _ in record.stacks)
    kernels = {
        name: shape.size * shape.dtype.itemsize
        for name, shape in base.items()
        if name.startswith(stacks) and name.endswith(".kernel")
    }
    modulations = sum(size for name, size in kernels.items() if ".norm" in name)
    assert plan.host_memory == sum(kernels.values()) == plain.memory["base"] - plan.memory["base"] > 0
    depths = dict(record.stacks)
    block = max(
        sum(size for name, size in kernels.items() if name.startswith(f"transformer.{path}.") and ".norm" not in name)
        / depths[path]
        for path in depths
    )
    assert [estimate(each.program, 0).gathered for each in (plain, plan)] == [0, block]
    assert plan.roofline.host == pytest.approx((2 * sum(kernels.values()) - modulations) / there.chip.host)
    assert plain.roofline.host == 0 and "blocks in the host's memory, streamed" in report.table(plan)
    assert streams in suggest.candidates(smoke(), gpu_plan)


@pytest.mark.skipif(not gpu_compiler.installed(), reason="jax's CUDA plugin is not installed")
def test_compiled_for_a_small_card(monkeypatch):
    """The compiler sees the blocks in the host's memory, and copies of a block each."""
    monkeypatch.setattr(gpu_compiler, "installed", lambda: True)
    half = {"compute_dtype": "bfloat16", "train.param_dtype": "bfloat16", "quantization": "int8", "remat": "full"}
    plan = make_plan(smoke(offload="blocks", **half), target("gpu:rtx3060"), "train")
    assert plan.compiled and plan.fits and not plan.costs
    assert re.search(r"s8\[\d+,\d+,\d+\]\{2,1,0:S\(5\)\}.*s8\[1,\d+,\d+\]\{2,1,0\}.*fusion-start", plan.compiled.text)


@pytest.fixture(scope="module")
def estimator(gpu_plan):
    return suggest.Estimator(smoke(), gpu_plan)


def test_what_remat_keeps(gpu_plan, estimator):
    """Blocks' inputs; attention's results beside them; each branch's last products and what adapters are inside; q, k
    and v; the MLP. By width d and token, float32.

    By hand: each of 2 + 6 blocks has one attention over all tokens, q, k, v and a MLP 4·d wide; a double block has two
    last products and six adapters a token, a single block one and five."""
    peaks = {remat: change.peak for remat, change in estimator.policies.items()}
    assert list(peaks) == ["none", "dots", "qkv", "outputs", "attention", "full"]
    assert sorted(peaks.values(), reverse=True) == list(peaks.values()) and peaks[smoke().remat] == gpu_plan.peak
    program, folder = gpu_plan.program, gpu_plan.program.job.folder
    vector = 4 * program.batch * (program.job.sequence + folder.text_tokens) * folder.backbone.features
    depths = dict(folder.backbone.stacks)
    double, single = depths["transformer_blocks"], depths["single_transformer_blocks"]
    assert peaks["attention"] - peaks["full"] == pytest.approx((double + single) * vector)
    inner = smoke().basis.size * smoke().basis.rank / folder.backbone.features * (6 * double + 5 * single)
    assert peaks["outputs"] - peaks["attention"] == pytest.approx((2 * double + single + inner) * vector)
    assert peaks["qkv"] - peaks["outputs"] == pytest.approx(3 * (double + single) * vector)
    assert peaks["dots"] - peaks["qkv"] == pytest.approx(4 * (double + single) * vector)
    assert "GiB at the peak by --config.remat (estimated): none " in "\n".join(suggest.lines(estimator, []))


def test_a_card_whose_name_ends_like_a_count():
    there = target("gpu:rtx4090")
    assert there.chip.name == "rtx4090" and len(there.devices) == 1


def test_other_meshes_that_may_fit():
    """Of the same devices, each once, and never the one in use."""
    for sizes in ((1, 4, 1, 1), (1, 1, 2, 2)):
        mesh = jax.sharding.AbstractMesh(sizes, sharding.AXES)
        plan = SimpleNamespace(program=SimpleNamespace(what="train", mesh=mesh))
        changes = [change for change in suggest.candidates(smoke(), plan) if "mesh.fsdp" in change]
        meshes = [tuple(change[f"mesh.{axis}"] for axis in sharding.AXES) for change in changes]
        assert set(meshes) == {(1, 4, 1, 1), (1, 2, 1, 2), (1, 1, 1, 4)} - {sizes} and len(meshes) == len(set(meshes))


def test_remat_that_suits_the_memory(gpu_plan, estimator, monkeypatch, capsys):
    """auto: what is fastest and leaves a tenth free; with too little for any, what keeps least."""
    peaks = {name: change.peak for name, change in estimator.policies.items()}
    asked = []

    def kept(program, traced):
        asked.append(program.job.config.remat)
        return estimator.kept[program.job.config.remat]

    def chosen(memory, platform="gpu", **changes):
        chip = dataclasses.replace(GPUS["h100"], memory=memory / 0.9)
        there = dataclasses.replace(gpu_plan.target, chip=chip, platform=platform)
        return remat.choose(smoke(remat="auto", **changes), there)

    monkeypatch.setattr(remat, "kept_by_example", kept)
    assert chosen(peaks["qkv"] * 1.0001) == "qkv" and asked == ["dots", "qkv"]
    assert "remat: qkv (fits; GiB at the peak, estimated: dots " in capsys.readouterr().out
    assert chosen(peaks["dots"] * 1.0001) == "dots" and chosen(peaks["full"] / 2) == "full"
    assert chosen(1e15) == "dots" and chosen(1e15, "cpu") == "none" and chosen(1e15, "cpu", offload="blocks") == "dots"
    assert "remat: full (nothing fits; GiB" in capsys.readouterr().out
    sized = {"data.quadrant_size": 0, "data.buckets": (), "train.batch": 1}
    assert chosen(1e15, **sized) == "full" and "can't be planned: config.data.quadrant" in capsys.readouterr().out
    assert remat.choose(smoke(remat="outputs"), gpu_plan.target) == "outputs"


def test_blocks_of_their_own_are_estimated_as_stacks(gpu_plan):
    plan = make_plan(smoke(unstacked=True), gpu_plan.target, "train")
    assert plan.peak == pytest.approx(gpu_plan.peak) and plan.work.model == gpu_plan.work.model


@pytest.mark.parametrize("name", ["v9:2x2", "v6e", "gpu:h300x8", "gpu:h100x0", "gpu:", "h100"])
def test_unknown_topologies(name):
    with pytest.raises(UserError, match="give .*v6e|give .*gpu:h100x8") as told:
        target(name)
    assert told.value.code == 2


def command(tmp_path, *options, **environment):
    """In a process of its own, which can have more devices than this one."""
    line = [
        sys.executable,
        "-m",
        "lorweb_jax.plan",
        f"--config={ROOT}/configs/basis.py:smoke",
        f"--config.pipeline={ROOT}/assets/small_kontext",
        "--config.precomputed=elsewhere",
        "--config.unroll=1",
        "--config.unstacked=False",
        f"--json={tmp_path}/plan.json",
        *options,
    ]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)


def test_command(tmp_path):
    """Four GPUs share what one held, each with one that has the other half of the tokens; a batch that doesn't divide
    is refused. All-to-alls: q, k, v and the result of 8 blocks, forward and back, of 1 x 52 tokens, 160 wide in
    float32, of which a device sends half."""
    refused = command(tmp_path, "--topology=gpu:h100x8", "--config.train.batch=12")
    assert refused.returncode == 2 and refused.stderr.startswith("error: a batch of 12 does not divide over 8")
    done = command(tmp_path, "--topology=gpu:h100x8", "--config.train.batch=8", "--config.mesh.sequence=2")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made["mesh"] == {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 1} and made["fits"] and made["estimated"]
    assert made["memory"]["basis"] == pytest.approx(4 * made["parameters"]["basis"] / 4, rel=0.05)
    assert set(made["traffic"]) == {"all-gather", "all-reduce", "all-to-all"} and not made["estimated_seconds"]
    assert made["traffic"]["all-to-all"]["count"] == 4 * 8 * 2
    assert made["traffic"]["all-to-all"]["sent"] == 4 * 8 * 2 * 52 * 160 * 4 / 2


@pytest.mark.skipif(not gpu_compiler.installed(), reason="jax's CUDA plugin is not installed")
def test_compiled_for_gpus(tmp_path):
    """Two of one host."""
    plugin = next(filter(None, map(importlib.util.find_spec, compiler_flags.PLUGINS)))
    half = ("--config.compute_dtype=bfloat16", "--config.train.param_dtype=bfloat16", "--config.remat=none")
    options = ("--topology=gpu:h100x2", "--config.train.batch=8", f"--profile={tmp_path}/profile.txt", *half)
    done = command(tmp_path, *options, PYTHONPATH=str(Path(plugin.origin).parents[1]))
    assert done.returncode == 0, done.stderr
    assert "time of a step, as the compiler estimates" in done.stdout and "cuDNN's attention: 57 % of" in done.stdout
    made = json.loads((tmp_path / "plan.json").read_text())
    assert not made["estimated"] and {"all-gather", "all-reduce"} <= made["traffic"].keys()
    spent = made["estimated_seconds"]
    for kind in ("products", "attention", "elementwise, reductions", estimated_time.COLLECTIVES):
        assert spent[kind]["forward"] > 0 and spent[kind]["backward"] > 0
    head, *rows = (tmp_path / "profile.txt").read_text().splitlines()
    assert head.split() == ["ms", "runs", "kind", "phase", "instruction", "line", "source"] and len(rows) == 50
    assert any("lorweb_jax/nn/" in row for row in rows)
