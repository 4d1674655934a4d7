"""Every field of every config: what makes no sense is refused, by its name, before anything is loaded."""

import math
import runpy
from pathlib import Path

import line_job
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings import checks
from lorweb_jax.settings import config as configs
from lorweb_jax.settings import fields as config_fields
from lorweb_jax.settings.rules import shown

CONFIGS = Path(__file__).parent.parent / "configs"
VARIANTS = {
    "basis": ("", "kontext", "kontext_16", "tanh", "internal", "smoke"),
    "single_lora": ("", "kontext", "kontext_16", "smoke"),
    "pair": ("", "kontext", "joint", "disjoint", "early_late", "smoke"),
    "base_vae": ("", "smoke"),
    "base_clip": ("", "smoke"),
    "base_transformer": ("", "smoke"),
}
EVERY = [f"{name}:{variant}" for name, variants in VARIANTS.items() for variant in variants]


def made(config: str):
    name, _, variant = config.partition(":")
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](variant)


def values(config) -> dict:
    return dict(configs.fields(config))


def refuse(fields: dict, name: str, value) -> str:
    """The sentence that refuses a value; it names field, value and what may stand there."""
    with pytest.raises(UserError) as caught:
        checks.check(fields | {name: value})
    told = str(caught.value)
    assert caught.value.code == 2 and "\n" not in told and len(told) < 600
    assert f"config.{name} is {shown(value)}; it must be " in told, told
    return told


@pytest.mark.parametrize("config", EVERY)
def test_every_field_of_every_config_has_a_rule_that_takes_it(config):
    fields = values(made(config))
    checks.check(fields)
    rules = config_fields.COMMON | config_fields.JOBS[fields["job"]]
    assert fields.keys() - {"job"} == rules.keys()


# By the type of what stands in the config: values of other types, and numbers that nothing could count or measure.
SENSELESS = {
    int: (True, 1.5, 2.0, "3", None, math.nan, math.inf, -2, -(10**12), 10**12, 10**5000, [1], {}),
    float: (True, "1.0", None, math.nan, math.inf, -math.inf, -1e-3, 1e300, 10**400, [1.0]),
    bool: (0, 1, "True", None, 0.0, []),
    str: (7, None, True, 1.5, ["a"], b"a", "a\0b", "\ud800"),
    list: (5, "12", None, [], [1] * 40, [math.nan] * 3, [-8, -8], ["a", "b"], {"a": 1}),
    type(None): ("wide", 0, -1, 1.5, True, 10**12),
}


@pytest.mark.parametrize("config", ["basis:", "pair:", "single_lora:", "base_vae:", "base_clip:", "base_transformer:"])
def test_values_of_no_sense_for_every_field(config):
    fields, tried = values(made(config)), 0
    good = ("seed", 10**12), ("evaluation.prompts", ["a", "b"]), ("data.buckets", []), ("trackers", [])
    for name, default in fields.items():
        for value in SENSELESS[type(default)]:
            if (name, value) not in good:
                refuse(fields, name, value)
                tried += 1
    assert tried > 200


@pytest.mark.parametrize(
    "name, bad",
    [
        ("seed", (-1, 2**64)),
        ("train.steps", (0,)),
        ("train.batch", (0, 2**21)),
        ("train.log_every", (0,)),
        ("train.checkpoint_every", (0,)),
        ("train.log_images_every", (0,)),
        ("train.ema", (1.0, 1)),
        ("train.param_dtype", ("int8", "float", "")),
        ("optimizer.name", ("sgd", "AdamW")),
        ("optimizer.learning_rate", (0, 0.0, 11.0)),
        ("optimizer.schedule", ("linear",)),
        ("optimizer.warmup", (1200, 1201)),
        ("optimizer.b1", (1.0, 1.5)),
        ("optimizer.b2", (1.0,)),
        ("optimizer.moments", ("int4", "float16")),
        ("optimizer.weight_decay", (101.0,)),
        ("optimizer.clip", (0.0,)),
        ("mesh.data", (0, -3)),
        ("mesh.sequence", (0, -2)),
        ("mesh.tensor", (0,)),
        ("pipeline", ("", "  ")),
        ("basis.size", (0, 4097)),
        ("basis.rank", (0, 4097)),
        ("basis.heads", (0, 3, 65)),
        ("basis.key_dim", (0, 65_537)),
        ("basis.activation", ("relu", "")),
        ("basis.reduction", ("max",)),
        ("basis.query", ("none",)),
        ("basis.query_mode", ("aa'b", "")),
        ("basis.pooling", ("mean",)),
        ("basis.projection", ("mlp",)),
        ("basis.temperature", (0, 0.0, 1e7)),
        ("basis.temperature_mode", ("", "falling")),
        ("basis.key_scale", (0.0,)),
        ("basis.scale", (0, -1.0)),
        ("routing.rate", (-0.1, 1e4)),
        ("routing.balance", (-0.1,)),
        ("routing.member_dropout", (1.0, 1)),
        ("data.root", ("",)),
        ("data.cache", ("",)),
        ("data.held_out", ("folder",)),  # the root is embedded
        ("data.quadrant_size", (4, 30, 4104, -8, [32], [32, 30], [32, 0], [32, 32, 32])),
        ("data.buckets", (32, [32, 32], [[32, 30]], [[32]], [[32, 32], [32, 32]])),
        ("data.caption_drop", (1.1,)),
        ("data.reverse_probability", (2,)),
        ("data.workers", (1025,)),
        ("loss_weight", ("bells", "")),
        ("guidance", (100.5,)),
        ("compute_dtype", ("float64", "int8", "bf16")),
        ("quantization", ("int4", "")),
        ("remat", ("all", "")),
        ("attention", ("flash",)),
        ("unroll", (0, 1001)),
        ("evaluation.tasks", (-1,)),
        ("evaluation.per_task", (-1,)),
        ("evaluation.batch", (0,)),
        ("evaluation.steps", (0, 1001)),
        ("evaluation.guidance", (101,)),
        ("job", ("", "nothing", "package:", ":function", "a b:c", 5, None)),
    ],
)
def test_values_beyond_the_range_of_a_basis(name, bad):
    fields = values(made("basis:"))
    for value in bad:
        refuse(fields, name, value)


@pytest.mark.parametrize(
    "config, name, bad",
    [
        ("base_vae:", "model.block_out_channels", ([], [16, 0], 16)),
        ("base_vae:", "model.norm_num_groups", (0, 5, 16.0, 24)),
        ("base_vae:", "data.plain", (1.5,)),
        ("base_vae:", "loss.kl", (2e6,)),
        ("base_vae:", "train.batch", (3,)),
        ("base_vae:", "data.size", (0, 12)),
        ("base_clip:", "vision.num_attention_heads", (0, 3)),
        ("base_clip:", "vision.patch_size", (0, 5)),
        ("base_clip:", "text.num_attention_heads", (5,)),
        ("base_clip:", "data.edits", (0,)),
        ("base_transformer:", "transformer.axes_dims_rope", ([8, 12, 14], [9, 11, 12], [16, 16], [32, 0, 0])),
        ("base_transformer:", "guidance", ([4.0, 1.0], [1.0], [1.0, 200.0])),
        ("base_transformer:", "data.variants", (0, 4)),
        ("base_transformer:", "evaluation.steps", (0,)),
        ("base_transformer:", "data.vae", ("",)),
        ("pair:", "pair.content_rank", (0, 4097)),
        ("pair:", "pair.single_style", ("", "evens", "1-", "-1", "2,x", "1,,2", [], [-1], ["1"], [True])),
        ("pair:", "pair.style_start", (-1, 400, 10**6)),
        ("pair:", "pair.times", ("all",)),
        ("pair:", "data.caption", ("", "  ")),
        ("pair:", "data.style_words", ("", "\t")),
        ("pair:", "data.content", ("",)),
        ("pair:", "data.long_edge", (0, 31)),
        ("pair:", "evaluation.prompts", ([], [""], "cat")),
        ("pair:", "train.accumulate", (0, 3)),
    ],
)
def test_values_beyond_the_range_of_other_jobs(config, name, bad):
    fields = values(made(config))
    for value in bad:
        refuse(fields, name, value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"basis.query": "internal"}, r"query_mode is \"cat-aa'b\"; it must be for an internal query, aa'bb'"),
        (
            {"basis.query": "internal", "basis.query_mode": "caa'b", "basis.query_dim": 96},
            "query_dim is 96; it must be None",
        ),
        ({"basis.query": "fixed", "basis.query_dim": 96}, "query_dim is 96; it must be None: a fixed query"),
        (
            {"basis.query": "internal", "basis.query_mode": "caa'b", "routing.balance": 0.1},
            "routing.balance is 0.1; it must be 0, as config.basis.query is internal",
        ),
        (
            {"basis.query": "internal", "basis.query_mode": "caa'b", "basis.temperature_mode": "annealed"},
            "temperature_mode is 'annealed'; it must be fixed or learnt",
        ),
        ({"basis.query": "fixed", "basis.normalised": True}, "it must be False.*there is no router"),
        ({"basis.projection": "none", "basis.query_dim": 96}, "it must be config.basis.key_dim, which is 64"),
        ({"optimizer.name": "muon", "optimizer.moments": "int8"}, "muon keeps its averages in float32"),
        ({"mesh.data": -1}, "one of them can be -1"),
        ({"mesh.data": 5}, "train.batch is 12; it must be a multiple of 5"),
        ({"mesh.data": 16, "mesh.fsdp": 3, "mesh.tensor": -1}, "train.batch is 12; it must be a multiple of 48"),
        ({"train.steps": 20}, "warmup is 20; it must be at least 0 and below config.train.steps, which is 20"),
        ({"data.rooot": "x"}, "config.data.rooot is no field of the job 'basis'"),
    ],
)
def test_fields_that_do_not_go_together(changes, told):
    with pytest.raises(UserError, match=told) as caught:
        checks.check(values(made("basis:")) | changes)
    assert caught.value.code == 2


def test_fields_of_a_pair_that_do_not_go_together():
    fields, none = values(made("pair:")), {"pair.double_content": "none", "pair.single_content": "none"}
    for changes, told in (
        (none, "style_start is 150; it must be 0, as the content is on no block"),
        (none | {"pair.double_style": "none", "pair.single_style": "none"}, "a list of blocks: neither"),
        ({"mesh.data": 8, "train.accumulate": 2}, "train.batch is 8; it must be a multiple of 16.*accumulate, 2"),
    ):
        with pytest.raises(UserError, match=told):
            checks.check(fields | changes)
    checks.check(fields | none | {"pair.style_start": 0, "pair.single_style": [3, 1], "pair.double_style": "0-1"})


def test_a_field_that_is_missing():
    fields = values(made("basis:"))
    for name in fields.keys() - {"job"}:
        with pytest.raises(UserError, match=f"the config has no field {name}; it must be "):
            checks.check({key: value for key, value in fields.items() if key != name})


@pytest.mark.parametrize(
    "changes",
    [
        {"basis.query_dim": 384},
        {"basis.projection": "none", "basis.query_dim": 64},
        {"data.quadrant_size": 0},
        {"data.quadrant_size": [64, 128]},
        {"data.buckets": [[64, 128], [128, 64]]},
        {"data.root": "folder", "data.held_out": "other"},
        {"optimizer.clip": 1e9},
        {"guidance": 1},
        {"optimizer.learning_rate": 1e-6},
        {"optimizer.weight_decay": 0},
        {"seed": 2**64 - 1},
        {"mesh.data": 2, "mesh.fsdp": 3, "mesh.tensor": 4},
        {"basis.encoder": "with spaces/é"},
        {"data.caption_drop": 1},
        {"basis.query": "fixed"},
        {"basis.normalised": True, "basis.temperature": 0.5, "basis.temperature_mode": "annealed"},
        {"routing.balance": 0.1, "routing.member_dropout": 0.5, "basis.key_scale": 0.1},
        {"routing.rate": 0, "basis.scale": 16},
        {"data.root": "not_utf8_\udce9"},
    ],
)
def test_values_that_make_sense(changes):
    checks.check(values(made("basis:")) | changes)


def test_a_job_of_ones_own_checks_its_own_fields():
    fields = values(line_job.get_config())
    checks.check(fields | {"line.anything": object()})
    refuse(fields, "train.steps", 0)


def test_choices_are_those_of_the_code_that_reads_them():
    from lorweb_jax.adapters import pair
    from lorweb_jax.flow.schedule import train_weights
    from lorweb_jax.jobs import JOBS
    from lorweb_jax.models.image_encoder.queries import QUERY_MODES
    from lorweb_jax.nn import quantization
    from lorweb_jax.nn.attention import IMPLEMENTATIONS
    from lorweb_jax.nn.layers import REMAT_POLICIES

    rules = config_fields.BASIS
    assert set(config_fields.QUERY_MODES) == {*QUERY_MODES, *config_fields.INTERNAL_MODES}
    assert (rules["quantization"].words, rules["attention"].words) == (quantization.KINDS, IMPLEMENTATIONS)
    assert set(rules["remat"].words) == {"auto", *REMAT_POLICIES}
    assert all(len(train_weights(name)) for name in rules["loss_weight"].words)
    assert set(config_fields.BLOCKS) == set(pair.BLOCKS)
    assert config_fields.JOBS.keys() == JOBS.keys()
