"""What each field of a config may be: a rule for each field of each job, and rules for fields together.

A field without a rule is refused, and so is a config that lacks a field with a rule: no field goes unchecked. Nothing
here imports jax, so that bad values are reported before anything is loaded. Jobs that are named by an import path check
fields of their own themselves.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.rules import (
    BATCH,
    BUCKETS,
    GUIDANCE,
    SAMPLING_STEPS,
    SEED,
    SHARE,
    SHOWN_AT_ONCE,
    SHOWN_PER_TASK,
    SIDE,
    WORKERS,
    Blocks,
    Choice,
    Either,
    Flag,
    Folder,
    Real,
    Rule,
    Several,
    Steps,
    Text,
    Whole,
    shown,
    steps_of,
)

_COUNT = Whole(1, 10**9)  # of steps
_WIDTH = Whole(1, 65_536)  # of features
_LAYERS = Whole(1, 1000)
_WEIGHT = Real(0, 1e6)  # of a part of a loss
_DTYPE = Choice(("float32", "bfloat16", "float16"))
_TOKENS = Whole(1, 512)

INTERNAL_MODES = ("aa'bb'", "caa'bb'", "caa'b", "caa'")
QUERY_MODES = ("cat-aa'b", "ca'-ca", "ca'-ca+cb", *INTERNAL_MODES, "paa'b", "cat-paa'b", "paa'b3", "cat-paa'b3")

COMMON: dict[str, Rule] = {
    "seed": SEED,
    "train.steps": _COUNT,
    "train.batch": BATCH,
    "train.accumulate": BATCH,
    "train.log_every": _COUNT,
    "train.checkpoint_every": _COUNT,
    "train.log_images_every": _COUNT,
    "train.ema": Real(0, 1, below=True),
    "train.param_dtype": _DTYPE,
    "optimizer.name": Choice(("adamw", "muon")),
    "optimizer.learning_rate": Real(0, 10, above=True),
    "optimizer.schedule": Choice(("constant", "cosine")),
    "optimizer.warmup": Whole(0, 10**9),
    "optimizer.b1": Real(0, 1, below=True),
    "optimizer.b2": Real(0, 1, below=True),
    "optimizer.moments": Choice(("float32", "bfloat16", "int8")),
    "optimizer.weight_decay": Real(0, 100),
    "optimizer.clip": Real(0, 1e12, above=True),
    "mesh.data": Whole(1, 2**20, also=(-1,)),
    "mesh.fsdp": Whole(1, 2**20, also=(-1,)),
    "mesh.tensor": Whole(1, 2**20, also=(-1,)),
    "profile": Steps(),
    "compile_cache": Flag(),
}

# How the frozen transformer is computed, of the jobs that train beside it.
_FROZEN: dict[str, Rule] = {
    "pipeline": Folder(),
    "guidance": GUIDANCE,
    "compute_dtype": _DTYPE,
    "quantization": Choice(("none", "int8", "fp8")),
    "remat": Choice(("none", "dots", "attention", "full")),
    "attention": Choice(("auto", "xla", "cudnn", "pallas")),
    "unroll": _LAYERS,
}

BASIS: dict[str, Rule] = _FROZEN | {
    "basis.size": Whole(1, 4096),
    "basis.rank": Whole(1, 4096),
    "basis.key_dim": _WIDTH,
    "basis.heads": _WIDTH,
    "basis.activation": Choice(("softmax", "tanh")),
    "basis.reduction": Choice(("mean", "sum")),
    "basis.query": Choice(("external", "internal", "fixed")),
    "basis.query_mode": Choice(QUERY_MODES),
    "basis.pooling": Choice(("avg", "max")),
    "basis.projection": Choice(("linear", "none")),
    "basis.query_dim": Whole(1, 2**20, also=(None,)),
    "basis.encoder": Folder(empty=True),
    "data.root": Folder(),
    "data.held_out": Folder(empty=True),
    "data.cache": Folder(),
    "data.quadrant_size": Either(Whole(8, 4096, multiple=8, also=(0,)), Several(SIDE, 2, 2)),
    "data.buckets": BUCKETS,
    "data.caption_drop": SHARE,
    "data.reverse_probability": SHARE,
    "data.task_balanced": Flag(),
    "data.workers": WORKERS,
    "precomputed": Folder(empty=True),
    "loss_weight": Choice(("bell", "uniform")),
    "evaluation.tasks": Whole(1, 10**6),
    "evaluation.per_task": SHOWN_PER_TASK,
    "evaluation.batch": SHOWN_AT_ONCE,
    "evaluation.steps": SAMPLING_STEPS,
    "evaluation.guidance": GUIDANCE,
}

BLOCKS = ("all", "none", "even", "odd", "early", "late")  # lists of blocks; see adapters/pair.py
PAIR: dict[str, Rule] = _FROZEN | {
    "pair.content_rank": Whole(1, 4096),
    "pair.style_rank": Whole(1, 4096),
    **{f"pair.{kind}_{member}": Blocks(BLOCKS) for kind in ("double", "single") for member in ("content", "style")},
    "pair.orthogonal": Flag(),
    "pair.style_start": Whole(0, 10**9),
    "pair.joint": Flag(),
    "pair.times": Choice(("batch", "example")),
    "data.content": Folder(),
    "data.style": Folder(),
    "data.condition": Folder(empty=True),
    "data.cache": Folder(),
    "data.caption": Text(),
    "data.style_words": Text(),
    "data.long_edge": Whole(32, 4096),
    "data.augment": Flag(),
    "evaluation.prompts": Several(Text(), 1, 100),
    "evaluation.batch": SHOWN_AT_ONCE,
    "evaluation.steps": SAMPLING_STEPS,
    "evaluation.guidance": GUIDANCE,
}

BASE_VAE: dict[str, Rule] = {
    "model.block_out_channels": Several(_WIDTH, 1, 10),
    "model.layers_per_block": _LAYERS,
    "model.norm_num_groups": _WIDTH,
    "model.latent_channels": _WIDTH,
    "model.mid_block_add_attention": Flag(),
    "model.sample_size": Whole(1, 65_536),
    "initial": Folder(empty=True),
    "data.drawings": Folder(),
    "data.signs": Whole(0, 10**6),
    "data.size": SIDE,
    "data.plain": SHARE,
    "data.enlarged": SHARE,
    "loss.absolute": _WEIGHT,
    "loss.squared": _WEIGHT,
    "loss.edge": _WEIGHT,
    "loss.kl": _WEIGHT,
    "loss.consistency": _WEIGHT,
}

BASE_CLIP: dict[str, Rule] = {
    "vision.hidden_size": _WIDTH,
    "vision.intermediate_size": _WIDTH,
    "vision.num_hidden_layers": _LAYERS,
    "vision.num_attention_heads": _WIDTH,
    "vision.projection_dim": _WIDTH,
    "vision.image_size": Whole(1, 4096),
    "vision.patch_size": Whole(1, 4096),
    "text.hidden_size": _WIDTH,
    "text.intermediate_size": _WIDTH,
    "text.num_hidden_layers": _LAYERS,
    "text.num_attention_heads": _WIDTH,
    "data.drawings": Folder(),
    "data.edits": Whole(1, 1000),
    "loss.caption": _WEIGHT,
    "loss.edit": _WEIGHT,
    "loss.family": _WEIGHT,
    "loss.kind": _WEIGHT,
}

FORMS = ("canvas", "single", "drawing", "large")  # of examples; see small_base/corpus.py
BASE_TRANSFORMER: dict[str, Rule] = {
    "transformer.num_layers": _LAYERS,
    "transformer.num_single_layers": _LAYERS,
    "transformer.num_attention_heads": _WIDTH,
    "transformer.attention_head_dim": _WIDTH,
    "transformer.in_channels": _WIDTH,
    "transformer.guidance_embeds": Flag(),
    "transformer.axes_dims_rope": Several(Whole(2, 65_536, multiple=2), 3, 3),
    "text.hidden_size": _WIDTH,
    "text.intermediate_size": _WIDTH,
    "text.num_hidden_layers": _LAYERS,
    "text.num_attention_heads": _WIDTH,
    "text_2.d_model": _WIDTH,
    "text_2.d_kv": _WIDTH,
    "text_2.d_ff": _WIDTH,
    "text_2.num_layers": _LAYERS,
    "text_2.num_heads": _WIDTH,
    "initial": Folder(empty=True),
    "unroll": _LAYERS,
    "data.drawings": Folder(),
    "data.signs": Whole(0, 10**6),
    "data.cache": Folder(),
    "data.size": SIDE,
    "data.vae": Folder(),
    "data.variants": Whole(1, 2),
    "data.encoded": Whole(0, 10**6),
    "data.spatial": SHARE,
    "data.text_tokens": _TOKENS,
    "data.style": SHARE,
    "data.last_only": SHARE,
    "data.edited_before": SHARE,
    "data.twice": SHARE,
    "data.vague": SHARE,
    "data.silent": SHARE,
    "data.caption_drop": SHARE,
    "data.condition_drop": SHARE,
    **{f"forms.{form}": Whole(1, 1000) for form in FORMS},
    **{f"form_weights.{form}": _WEIGHT for form in FORMS},
    "loss_weight": Choice(("bell", "uniform")),
    "guidance": Several(GUIDANCE, 2, 2),
    "evaluation.steps": SAMPLING_STEPS,
}

JOBS: dict[str, dict[str, Rule]] = {
    "basis": BASIS,
    "pair": PAIR,
    "base_vae": BASE_VAE,
    "base_clip": BASE_CLIP,
    "base_transformer": BASE_TRANSFORMER,
}
_IMPORT_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

Values = Mapping[str, Any]  # by dotted field


def check(values: Values) -> None:
    """UserError, with status 2, for the first field that breaks a rule: it names field, value and what is allowed."""
    job = values.get("job")
    if not (isinstance(job, str) and (job in JOBS or _IMPORT_PATH.fullmatch(job))):
        raise refused("job", job, f"{', '.join(JOBS)} or an import path package.module:function")
    rules = COMMON | JOBS.get(job, {})
    for name, rule in rules.items():
        if name not in values:
            raise UserError(f"the config has no field {name}; it must be {rule}", 2)
        if not rule.takes(values[name]):
            raise refused(name, values[name], str(rule))
    if job in JOBS and (unknown := sorted(values.keys() - rules.keys() - {"job"})):
        raise UserError(
            f"config.{unknown[0]} is no field of the job {job!r}, whose fields are those of configs/"
            f"{job}.py; leave it out",
            2,
        )
    for together in (_training, _TOGETHER.get(job, lambda values: None)):
        together(values)


def paths(job: str) -> frozenset[str]:
    """The fields of a job that are paths."""
    return frozenset(name for name, rule in JOBS.get(job, {}).items() if isinstance(rule, Folder))


def refused(name: str, value: Any, expected: str) -> UserError:
    """The error for a field's value."""
    return UserError(f"config.{name} is {shown(value)}; it must be {expected}: set --config.{name}=…", 2)


def _training(values: Values) -> None:
    if values["optimizer.warmup"] >= values["train.steps"]:
        raise refused(
            "optimizer.warmup",
            values["optimizer.warmup"],
            f"at least 0 and below config.train.steps, which is {values['train.steps']}",
        )
    if (profiled := steps_of(values["profile"])) and profiled[-1] > values["train.steps"]:
        raise refused(
            "profile", values["profile"], f"of steps up to config.train.steps, which is {values['train.steps']}"
        )
    moments, name = values["optimizer.moments"], values["optimizer.name"]
    if moments != "float32" and name != "adamw":
        raise UserError(
            f"config.optimizer.moments is {moments!r}, but {name} keeps its averages in float32; leave it "
            "at float32, or set --config.optimizer.name=adamw",
            2,
        )
    sizes = {axis: values[f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")}
    if list(sizes.values()).count(-1) > 1:
        raise UserError(
            f"config.mesh is {', '.join(f'{axis} {size}' for axis, size in sizes.items())}; one of them "
            "can be -1 and take the devices that the others leave: set --config.mesh.…",
            2,
        )
    shares, batch = math.prod(sizes[axis] for axis in ("data", "fsdp") if sizes[axis] > 0), values["train.batch"]
    if batch % (accumulate := values["train.accumulate"]):
        raise refused(
            "train.accumulate",
            accumulate,
            f"a divisor of config.train.batch, which is {batch}: micro-batches are of one size",
        )
    if batch // accumulate % shares:
        raise refused(
            "train.batch",
            batch,
            f"a multiple of {shares * accumulate}, the number of devices that config.mesh.data and .fsdp share it "
            "among" + f", times config.train.accumulate, {accumulate}" * (accumulate > 1),
        )


def _basis(values: Values) -> None:
    query, mode, width = (values[f"basis.{name}"] for name in ("query", "query_mode", "query_dim"))
    _divides(values, "basis.heads", "basis.key_dim")
    if query == "internal" and mode not in INTERNAL_MODES:
        raise refused("basis.query_mode", mode, f"for an internal query, {Choice(INTERNAL_MODES)}")
    if query != "external" and width is not None:
        raise refused("basis.query_dim", width, f"None: {_ARTICLE[query]} query has no width of its own")
    if query == "external" and values["basis.projection"] == "none" and width not in (None, values["basis.key_dim"]):
        raise refused(
            "basis.query_dim",
            width,
            f"config.basis.key_dim, which is {values['basis.key_dim']}, or None, as config.basis.projection is none",
        )
    if len(set(map(tuple, values["data.buckets"]))) < len(values["data.buckets"]):
        raise refused("data.buckets", values["data.buckets"], "shapes of which no two are the same")
    if values["data.root"] == "embedded" and values["data.held_out"]:
        raise refused(
            "data.held_out",
            values["data.held_out"],
            "empty, as config.data.root is embedded, which has held-out tasks of its own",
        )


def _pair(values: Values) -> None:
    start, steps = values["pair.style_start"], values["train.steps"]
    on = {
        member: any(values[f"pair.{kind}_{member}"] != "none" for kind in ("double", "single"))
        for member in ("content", "style")
    }
    if not any(on.values()):
        raise refused("pair.single_style", "none", "a list of blocks: neither content nor style is on any")
    if on["style"] and start >= steps:
        raise refused(
            "pair.style_start", start, f"below config.train.steps, which is {steps}: else no style is learned"
        )
    if not on["content"] and start:
        raise refused(
            "pair.style_start", start, "0, as the content is on no block: nothing is trained before the style"
        )


_ARTICLE = {"internal": "an internal", "fixed": "a fixed"}


def _divides(values: Values, part: str, whole: str) -> None:
    if values[whole] % values[part]:
        raise refused(part, values[part], f"a divisor of config.{whole}, which is {values[whole]}")


def _base_vae(values: Values) -> None:
    for channels in values["model.block_out_channels"]:
        if channels % values["model.norm_num_groups"]:
            raise refused(
                "model.norm_num_groups",
                values["model.norm_num_groups"],
                f"a divisor of each of config.model.block_out_channels, such as {channels}",
            )
    if values["train.batch"] // values["train.accumulate"] % 2:
        raise refused(
            "train.batch",
            values["train.batch"],
            f"a multiple of {2 * values['train.accumulate']}: half of what is computed at once is decoded whole, half "
            "as quadrants",
        )


def _base_clip(values: Values) -> None:
    for tower in ("vision", "text"):
        _divides(values, f"{tower}.num_attention_heads", f"{tower}.hidden_size")
    _divides(values, "vision.patch_size", "vision.image_size")


def _base_transformer(values: Values) -> None:
    _divides(values, "text.num_attention_heads", "text.hidden_size")
    axes, width = values["transformer.axes_dims_rope"], values["transformer.attention_head_dim"]
    if sum(axes) != width:
        raise refused(
            "transformer.axes_dims_rope",
            axes,
            f"three even numbers of the sum config.transformer.attention_head_dim, which is {width}",
        )
    low, high = values["guidance"]
    if low > high:
        raise refused("guidance", values["guidance"], "two numbers, the lower one first")


_TOGETHER: dict[str, Callable[[Values], None]] = {
    "basis": _basis,
    "pair": _pair,
    "base_vae": _base_vae,
    "base_clip": _base_clip,
    "base_transformer": _base_transformer,
}
