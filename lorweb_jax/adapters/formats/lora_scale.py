"""The scale of each layer of a LoRA: alpha / R, from every place where files keep alpha and the rank R.

`.alpha` tensors (kohya and what follows it), PEFT's settings in the header (`lora_adapter_metadata`, as diffusers
writes them) or in adapter_config.json beside the file. Where none of them says anything, the scale is 1.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, checked, parse_json, read_json, shown
from lorweb_jax.files.checkpoint import Checkpoint

HEADER, BESIDE = "lora_adapter_metadata", "adapter_config.json"
_COMPONENT = "transformer."  # what diffusers puts before each setting
_LONGEST = 50_000_000  # bytes of settings: a pattern for every layer takes less than one

Rank = Annotated[int, Between(1, 65536)]
Alpha = Annotated[float, Between(1e-12, 1e12)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of PEFT's LoraConfig what changes an update. A pattern's key is a module's name, or how it ends."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    use_rslora: bool = False
    peft_type: str | None = "LORA"
    init_lora_weights: bool | str | None = True


# Settings under which the update is another than scale · B A, or isn't all of it.
_UNREAD = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "modules_to_save": "modules trained whole",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "repeated layers",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRAs of bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# With these PEFT takes part of the base's weights away when the training begins, so that A and B alone tell nothing.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Where trainers note alpha in the header's plain words; what loads LoRAs looks at none of them.
_NOTES = ("ss_network_alpha", "network_alpha", "lora_alpha", "linear_alpha", "alpha")


class Scales:
    """The scales of a file's layers. `notes` are sentences about what is written in the file and isn't taken."""

    def __init__(self, checkpoint: Checkpoint, peft_names: bool):
        """peft_names: whether the file's keys are those of a PEFT folder. UserError for settings that aren't read."""
        self.checkpoint, self.notes = checkpoint, []
        self.settings, self.source = self._settings(peft_names)

    def _settings(self, peft_names: bool) -> tuple[Settings | None, str]:
        file, text = self.checkpoint.files[0], self.checkpoint.metadata.get(HEADER)
        if text is not None:
            source = f"{file}: {HEADER} in its header"
            if len(text) > _LONGEST:
                raise UserError(f"{source} has {len(text):,} characters; download the file again")
            values = checked(parse_json(text, source), dict[str, Any], source)
            own = {
                name.removeprefix(_COMPONENT): value for name, value in values.items() if name.startswith(_COMPONENT)
            }
            if own or "r" in values:
                return _checked(own or values, source), source
        beside = file.with_name(BESIDE)
        if not beside.exists():
            return None, ""
        if peft_names or file.stem.startswith("adapter_model") or len(list(file.parent.glob("*.safetensors"))) == 1:
            return _checked(read_json(beside), str(beside)), str(beside)
        self.notes.append(f"{beside} isn't read, since it may belong to another file there")
        return None, ""

    def of(self, module: str, rank: int, alpha_key: str | None) -> float:
        """The scale of a layer by its name in the file, without prefix; alpha_key: its `.alpha` tensor, if any."""
        stated = self._stated(module, rank) if self.settings else None
        if alpha_key is None:
            return 1.0 if stated is None else stated
        scale = self._alpha(alpha_key) / rank
        if stated is not None and not math.isclose(stated, scale, rel_tol=1e-3):
            raise UserError(
                f"{self.checkpoint.files[0]}: by {shown(alpha_key)} the scale of {shown(module)} is "
                f"{scale:.6g}, by {self.source} it is {stated:.6g}; remove the one that is wrong"
            )
        return scale

    def _stated(self, module: str, rank: int) -> float:
        settings = self.settings
        r = _of_pattern(settings.rank_pattern, module, settings.r, self.source)
        if r != rank:
            raise UserError(
                f"{self.source} says that {shown(module)} has rank {r}, but its tensors have {rank}; give "
                "the settings that belong to this file"
            )
        alpha = _of_pattern(settings.alpha_pattern, module, settings.lora_alpha, self.source)
        return alpha / (math.sqrt(r) if settings.use_rslora else r)

    def _alpha(self, key: str) -> float:
        file, shape = self.checkpoint.files[0], self.checkpoint.shapes[key]
        if math.prod(shape) != 1:
            raise UserError(f"{file}: {shown(key)} is {list(shape)}, expected one number; download the file again")
        alpha = float(np.asarray(self.checkpoint.read(key)).astype(np.float64).reshape(()))
        if not math.isfinite(alpha) or alpha <= 0:
            raise UserError(
                f"{file}: {shown(key)} is {alpha:g}, expected a finite number above 0; download the file again"
            )
        return alpha

    def say(self, ranks: Iterable[int], with_alpha: int, layers: int) -> list[str]:
        """`notes`, and what the header or a lack of alphas leaves open. ranks: of all layers; with_alpha of them have
        a tensor."""
        notes, file = list(self.notes), self.checkpoint.files[0]
        if self.settings is None and not with_alpha:
            for name in _NOTES:
                if (number := _number(self.checkpoint.metadata.get(name))) and set(ranks) != {number}:
                    notes.append(
                        f"{file}: its header says {name} = {number:g}, but its layers hold no alpha, so that "
                        "it is taken at scale 1, as diffusers and ComfyUI take it"
                    )
                    break
        elif self.settings is None and with_alpha < layers:
            notes.append(f"{file}: {layers - with_alpha} of {layers} layers have no alpha; they are taken at scale 1")
        return notes


def _checked(values: Mapping[str, Any], source: str) -> Settings:
    settings = checked(dict(values), Settings, source)
    if settings.peft_type not in (None, "LORA"):
        raise UserError(
            f"{source} says that this is a {shown(settings.peft_type)}, which isn't read here; give an ordinary LoRA"
        )
    if unread := [(field, words) for field, words in _UNREAD.items() if values.get(field)]:
        field, words = unread[0]
        raise UserError(f"{source} has {field} set ({words}), which isn't read here; give an ordinary LoRA")
    if values.get("bias") not in (None, "none"):
        raise UserError(
            f"{source} has bias {shown(values['bias'])}: biases were trained too, which isn't read here; "
            "give an ordinary LoRA"
        )
    start = str(settings.init_lora_weights).lower()
    if start.startswith(_CHANGES_BASE):
        raise UserError(
            f"{source} says that it was begun as {shown(start)}, which changes the base's weights; save it "
            "in PEFT as an ordinary LoRA (path_initial_model_for_weight_conversion)"
        )
    return settings


# What a pattern may be: a name, perhaps with ^ or $, and no more regular expression than that, with which a file
# could keep a program busy for ever.
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_\-]|\\?\.)+\$?")


def _of_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any, source: str) -> Any:
    """As PEFT looks a module up: the first pattern that is its name or how it ends, at a dot."""
    for pattern, value in (patterns or {}).items():
        if len(pattern) > 1000 or not _PLAIN.fullmatch(pattern):
            raise UserError(
                f"{source} has the pattern {shown(pattern)}; names of layers are read here, not regular "
                "expressions: write the layers' names out"
            )
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
