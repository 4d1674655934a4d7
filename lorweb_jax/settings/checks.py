"""Whether a config can be used: every field by its rule (settings/fields.py), and fields together.

A field without a rule is refused, and so is a config that lacks a field with a rule: no field goes unchecked. Nothing
here imports jax, so that bad values are reported before anything is loaded. Jobs that are named by an import path check
fields of their own themselves.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.settings.fields import COMMON, INTERNAL_MODES, JOBS
from lorweb_jax.settings.rules import Choice, shown, steps_of

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
    sizes = {axis: values[f"mesh.{axis}"] for axis in ("data", "fsdp", "sequence", "tensor")}
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


def _streams(values: Values) -> None:
    # What is kept for the way back would be every block's copy on the device.
    if values["offload"] == "blocks" and values["remat"] == "none":
        raise refused(
            "remat",
            "none",
            "auto, dots, qkv, outputs, attention or full, as config.offload is blocks, which are streamed both ways",
        )
    if values["offload"] == "blocks" and values["unstacked"]:
        raise refused("unstacked", True, "False, as config.offload is blocks, which are streamed out of stacks")


def _basis(values: Values) -> None:
    _streams(values)
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
    why = f"as config.basis.query is {query}"
    if query == "fixed":
        for name, expected in (
            ("basis.normalised", False),
            ("basis.temperature", 1.0),
            ("basis.temperature_mode", "fixed"),
            ("basis.key_scale", 1.0),
        ):
            if values[name] != expected:
                raise refused(name, values[name], f"{expected}, {why}: there is no router")
    if query != "external":
        for name in ("routing.balance", "routing.member_dropout"):
            if values[name]:
                raise refused(name, values[name], f"0, {why}: coefficients aren't known before layers run")
        if values["basis.temperature_mode"] == "annealed":
            raise refused("basis.temperature_mode", "annealed", f"fixed or learnt, {why}")
    if len(set(map(tuple, values["data.buckets"]))) < len(values["data.buckets"]):
        raise refused("data.buckets", values["data.buckets"], "shapes of which no two are the same")
    if values["data.root"] == "embedded" and values["data.held_out"]:
        raise refused(
            "data.held_out",
            values["data.held_out"],
            "empty, as config.data.root is embedded, which has held-out tasks of its own",
        )


def _pair(values: Values) -> None:
    _streams(values)
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
