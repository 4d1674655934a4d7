"""Ordinary LoRAs of FLUX.1 in any program's names (lora_names.py), read as a basis of one member."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorweb_jax.adapters.basis import AdaptedLayer
from lorweb_jax.adapters.config import BasisConfig
from lorweb_jax.adapters.formats import lora_names
from lorweb_jax.adapters.formats.layer_names import layer_name
from lorweb_jax.adapters.formats.lora_scale import Scales
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.finite import require_finite
from lorweb_jax.common.schema import shown
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import FLOATS

Layers = Mapping[str, AdaptedLayer]  # by path
# What an update by B A leaves out, which trainers write as zeros where it wasn't trained.
_MAY_BE_ZERO = ("a LoRA bias", "whole weights", "whole differences of weights")


def read_lora(path: str | Path, layers: Layers) -> tuple[BasisConfig, dict[str, dict[str, np.ndarray]]]:
    """A LoRA's file (or a folder that holds one) as a basis of one member with the fixed coefficient 1:
    (config, {path: {"a" [l,1,i,R], "b" [l,1,R,o]}}), float32.

    layers: of the model. Fused layers are cut up; layers of lower rank are filled up with zeros, blocks without an
    update are zero, kinds of layers without any are left out; the scale (see lora_scale) is multiplied into b. A line
    says what the file holds beside: adapters of text encoders and of layers outside the blocks.
    Raises UserError for another kind of adapter, a layer or a width that the model hasn't got, and numbers that aren't
    finite.
    """
    checkpoint = Checkpoint(path)
    contents = _Contents(checkpoint)
    scales = Scales(checkpoint, "PEFT's" in contents.schemes)
    updates: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = {}
    ranks = []
    for (_, module), layer in contents.layers.items():
        where, widths = layer.place, layer.widths(layers)
        rank, a, b = layer.read(checkpoint, where, layers)
        ranks.append(rank)
        b = b * np.float32(scales.of(module, rank, layer.keys.get("alpha")))
        for own, part in zip(where.paths, np.split(b, np.cumsum(widths)[:-1])):
            if (own, where.block) in updates:
                raise UserError(
                    f"{contents.file} holds two updates of {layer_name(own, where.block)}, in the names of "
                    f"two programs ({_shown(layer.keys['down'])}); remove one of them"
                )
            updates[own, where.block] = _needed(a, part) if len(widths) > 1 else (a, part)
    with_alpha = sum("alpha" in layer.keys for layer in contents.layers.values())
    for note in [*scales.say(ranks, with_alpha, len(ranks)), *contents.left_out()]:
        say(note)
    return _stacked(updates, layers)


def _needed(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A part of a fused layer without the rows of A that only other parts use; at least one is kept."""
    used = np.flatnonzero(b.any(axis=0))
    used = used if used.size else np.array([0])
    return (a, b) if used.size == a.shape[0] else (a[used], b[:, used])


def _stacked(
    updates: Mapping[tuple[str, int], tuple[np.ndarray, np.ndarray]], layers: Layers
) -> tuple[BasisConfig, dict[str, dict[str, np.ndarray]]]:
    rank = max(a.shape[0] for a, _ in updates.values())
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for (path, block), (a, b) in updates.items():
        depth, i, o = layers[path].depth, layers[path].inputs, layers[path].outputs
        if path not in arrays:
            arrays[path] = {
                "a": np.zeros((depth, 1, i, rank), np.float32),
                "b": np.zeros((depth, 1, rank, o), np.float32),
            }
        arrays[path]["a"][block, 0, :, : a.shape[0]] = a.T
        arrays[path]["b"][block, 0, : a.shape[0]] = b.T
    return BasisConfig(size=1, rank=rank, query="fixed", query_dim=None), arrays


class _Layer:
    """The tensors of one layer: {"down", "up", "alpha": key}."""

    def __init__(self, name: str, place: lora_names.Place):
        self.name, self.place, self.keys, self.adapters = name, place, {}, set()

    def widths(self, layers: Layers) -> list[int]:
        return [layers[path].outputs for path in self.place.paths if path in layers]

    def read(
        self, checkpoint: Checkpoint, where: lora_names.Place, layers: Layers
    ) -> tuple[int, np.ndarray, np.ndarray]:
        """(R, a [R, i], b [o, R]), float32."""
        file = checkpoint.files[0]
        if any(path not in layers or where.block >= layers[path].depth for path in where.paths):
            raise UserError(
                f"{file} adapts {_shown(self.name)}, which the model hasn't got; use the LoRA with its own model"
            )
        if not {"down", "up"} <= set(self.keys):
            raise UserError(
                f"{file} holds only one of the two factors of {_shown(self.name)} "
                f"({_shown(next(iter(self.keys.values())))}); download it again"
            )
        a, b = (_flat(checkpoint.shapes[self.keys[side]]) for side in ("down", "up"))
        i, o = layers[where.paths[0]].inputs, sum(self.widths(layers))
        if len(a) != 2 or len(b) != 2 or a[1] != i or b[0] != o or a[0] != b[1] or not a[0]:
            raise UserError(
                f"{file}: {_shown(self.name)} has lora_A {list(a)} and lora_B {list(b)}, expected [R, {i}] "
                f"and [{o}, R]; use the LoRA with its own model"
            )
        return a[0], finite(checkpoint, self.keys["down"]).reshape(a), finite(checkpoint, self.keys["up"]).reshape(b)


def _shown(key: str) -> str:
    """A key as a message shows it; whatever is in it, it stays one line."""
    return key if key.isascii() and key.isprintable() and len(key) < 200 else shown(key)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Linear layers that a trainer wrote as 1x1 convolutions."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def finite(checkpoint: Checkpoint, key: str) -> np.ndarray:
    """A tensor of floating-point numbers in float32. UserError for others, and where one is not finite."""
    if checkpoint.dtype(key) not in FLOATS:
        raise UserError(
            f"{checkpoint.files[0]}: {_shown(key)} holds numbers of type {checkpoint.dtype(key).name}, "
            "expected floating point; give an ordinary LoRA"
        )
    with np.errstate(over="ignore"):  # told by the line that follows
        array = checkpoint.read(key).astype(np.float32)
    require_finite(array, f"{checkpoint.files[0]}: {_shown(key)} in float32", "train it again")
    return array


class _Contents:
    """What a file holds by its keys: layers inside the blocks, and what beside. UserError for what isn't read here."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint, self.file = checkpoint, checkpoint.files[0]
        self.layers: dict[tuple[str, str], _Layer] = {}
        self.schemes: set[str] = set()
        self.text: dict[str, set[str]] = {}  # CLIP, T5 or learned words: keys' beginnings
        self.outside: dict[str, list[str]] = {}  # layer outside the blocks: its keys
        others: dict[str, list[str]] = {}  # kind of adapter: its keys
        unknown = []
        for name in checkpoint:
            if text := lora_names.text_encoder(name):
                self.text.setdefault(text, set()).add(name.rsplit(".", 2)[0])
                continue
            key = lora_names.parse(name)
            where = lora_names.place(key) if key else None
            if key is None or key.scheme is None and not where:
                unknown.append(name)
            elif key.role not in lora_names.ROLES:
                others.setdefault(key.role, []).append(name)
            elif where:
                self.schemes.add(key.scheme)
                self._add(name, key, where)
            elif lora_names.is_outside(key):
                self.outside.setdefault(key.module, []).append(name)
            else:
                unknown.append(name)
        self._refuse(others, unknown)

    def _add(self, name: str, key: lora_names.Key, where: lora_names.Place) -> None:
        layer = self.layers.setdefault((key.prefix, key.module), _Layer(key.prefix + key.module, where))
        layer.adapters |= {key.adapter} if key.role != "alpha" else set()
        if len(layer.adapters) > 1:
            raise UserError(
                f"{self.file} holds several LoRAs, {', '.join(map(shown, sorted(layer.adapters)))}; save "
                "the one that is wanted in a file of its own"
            )
        if key.role in layer.keys:
            raise UserError(
                f"{self.file} holds both {_shown(layer.keys[key.role])} and {_shown(name)}; remove one of them"
            )
        layer.keys[key.role] = name

    def _refuse(self, others: Mapping[str, list[str]], unknown: list[str]) -> None:
        whose = " and ".join(sorted(self.schemes)) or "no known program's"
        if (others or unknown) and (model := lora_names.other_model(self.checkpoint)):
            raise UserError(
                f"{self.file} is a LoRA for {model} "
                f"({_shown((unknown or next(iter(others.values())))[0])}); give one for FLUX.1"
            )
        for kind, keys in others.items():
            if not (kind in _MAY_BE_ZERO and all(not finite(self.checkpoint, key).any() for key in keys)):
                raise UserError(
                    f"{self.file} holds {kind} ({_shown(keys[0])}), which isn't read here; give an ordinary "
                    "LoRA, whose layers are two factors each"
                )
        if unknown:
            raise UserError(
                f"{self.file} is a LoRA in {whose} names that adapts {_shown(unknown[0])}, which FLUX.1 "
                "hasn't got; use it with its own model"
            )
        if not self.layers:
            what = ", ".join([*self.text, *self.outside]) or "nothing"
            raise UserError(f"{self.file} adapts no layer inside FLUX.1's blocks (it adapts {what}); give another LoRA")

    def left_out(self) -> list[str]:
        """A sentence for each kind of thing in the file that is not applied; zeros need none."""
        parts = [
            f"its adapter of {text} ({len(names)} layers)" if text != "learned words" else text
            for text, names in self.text.items()
        ]
        outside = [
            module
            for module, keys in self.outside.items()
            if any(lora_names.parse(key).role == "up" and finite(self.checkpoint, key).any() for key in keys)
        ]
        if outside:
            parts.append(
                f"{', '.join(outside[:3])}{f' and {len(outside) - 3} more' if len(outside) > 3 else ''}, "
                "outside the blocks"
            )
        return [f"{self.file}: left out {'; '.join(parts)}"] if parts else []
