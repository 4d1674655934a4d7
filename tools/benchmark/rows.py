"""Which rows a run of the benchmark has, and which of them are compared."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from benchmark.setting import Setting

# Kinds of row by what is measured, in the order of the table. "weights" is what torch's training rows do too; "inputs"
# goes backward through the frozen model without a basis, so that what "basis" takes longer is the basis's own.
KINDS = {
    "sample": {
        "base": "ours",
        "inside": "ours, modulations in the step",
        "low-rank": "ours + basis, low-rank",
        "folded": "ours + basis, folded",
    },
    "train": {
        "weights": "ours, gradient of all weights",
        "inputs": "ours frozen, gradient of tokens",
        "basis": "ours frozen, basis train step",
    },
}
TORCH_KINDS = {
    "sample": {"eager": "diffusers", "compiled": "diffusers, torch.compile"},
    "train": {
        "eager": "diffusers, gradient of all weights",
        "compiled": "diffusers, the same, torch.compile",
        "lora": "diffusers frozen, LoRA train step",
        "lora compiled": "diffusers, the same LoRA, torch.compile",
    },
}
# Measured for every variant; the others once, for the first variant that can.
_EVERY = {"sample": ("base", "low-rank"), "train": ("basis",)}
# 8-bit weights have no gradient, and no mix is folded into them.
_UNQUANTISED = ("folded", "weights")
_COMPARED = {"sample": (("inside", "base"), ("low-rank", "base"), ("folded", "base")), "train": (("basis", "inputs"),)}
# With torch's: "inside" does the same work a step as diffusers, "base" has done part of it beforehand. A LoRA has the
# basis's trainables but the router's.
_BESIDE_TORCH = {
    "sample": {"base": ("eager", "compiled"), "inside": ("eager", "compiled")},
    "train": {"weights": ("eager", "compiled"), "basis": ("lora", "lora compiled")},
}
# Copies of the weights that a row needs, roughly: gradients, the basis and its optimizer, folding.
_COPIES = {
    "base": 1.2,
    "inside": 1.2,
    "low-rank": 1.4,
    "folded": 2.0,
    "weights": 2.5,
    "inputs": 1.5,
    "basis": 3.0,
    "eager": 2.0,
    "compiled": 2.5,
    "lora": 2.5,
    "lora compiled": 3.0,
}
_VARIED = ("quantization", "moments", "remat")
_SHOWN = {"quantization": "{}", "moments": "moments {}", "remat": "remat {}"}


class BenchmarkRow(NamedTuple):
    """`key` is the row's name in --json: its kind and what tells it from the first variant's."""

    key: str
    name: str
    kind: str
    setting: Setting

    @property
    def torch(self) -> bool:
        return self.kind in TORCH_KINDS[self.setting.what]


class Pair(NamedTuple):
    """Keys of two rows of which the ratio of times is of interest; `torch` where the second is diffusers'."""

    row: str
    other: str
    torch: bool = False


def varied(variants: Sequence[Setting]) -> list[str]:
    """Fields in which the variants differ."""
    return [field for field in _VARIED if len({getattr(setting, field) for setting in variants}) > 1]


def make_rows(variants: Sequence[Setting], with_torch: bool) -> list[BenchmarkRow]:
    """All rows of the table: every kind for the first variant, and for the others what they are measured for."""
    what, fields, rows = variants[0].what, varied(variants), []
    for setting in variants:
        told = [
            _SHOWN[field].format(getattr(setting, field))
            for field in fields
            if field != "quantization" or setting.quantization != "none"
        ]
        for kind, name in KINDS[what].items():
            done = kind not in _EVERY[what] and any(row.kind == kind for row in rows)
            if done or (kind in _UNQUANTISED and setting.quantization != "none"):
                continue
            first = not rows or setting is variants[0]
            key = kind if first else " ".join([kind, *(getattr(setting, field) for field in fields)])
            rows.append(BenchmarkRow(key, ", ".join([name, *told]), kind, setting))
    if with_torch:
        plain = next((setting for setting in variants if setting.quantization == "none"), variants[0])
        rows += [BenchmarkRow(kind, name, kind, plain) for kind, name in TORCH_KINDS[what].items()]
    return rows


def pairs(rows: Sequence[BenchmarkRow]) -> list[Pair]:
    """What is compared: kinds within a variant, variants with the first, ours with torch's."""
    what, found = rows[0].setting.what, []
    of = {(row.kind, row.setting): row.key for row in rows if not row.torch}
    for row, other in _COMPARED[what]:
        found += [
            Pair(key, of[other, setting])
            for (kind, setting), key in of.items()
            if kind == row and (other, setting) in of
        ]
    for kind in _EVERY[what]:
        first, *rest = [row.key for row in rows if row.kind == kind]
        found += [Pair(key, first) for key in rest]
    for kind, theirs in _BESIDE_TORCH[what].items():
        ours = next((row.key for row in rows if row.kind == kind and row.setting.quantization == "none"), None)
        found += [Pair(ours, row.key, True) for row in rows if row.kind in theirs and ours]
    return found


def memory_needed(rows: Sequence[BenchmarkRow]) -> float:
    """Bytes that these rows need at once, roughly: weights are most of it, for any size but the smallest."""
    total = 0.0
    for row in rows:
        setting = row.setting
        wide = 2 if setting.dtype == "bfloat16" else 4
        weights = sum(layer.weights for layer in setting.backbone.adapted.values())
        total += weights * (1 if setting.quantization != "none" and not row.torch else wide)
        total += weights * wide * (_COPIES[row.kind] - 1)
    return total


def with_attention(variants: Sequence[Setting], attention: str) -> list[Setting]:
    return [dataclasses.replace(setting, attention=attention) for setting in variants]
