"""LoRA files for FLUX.1 as other programs write them; names written out here, not taken from the code under test."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

WIDTH = 3072
# Black Forest Labs' layer -> diffusers' layers that it stands for, inputs and outputs in units of the model's width.
LAYERS = {
    "double_blocks.{}.img_mod.lin": (["transformer_blocks.{}.norm1.linear"], 1, [6]),
    "double_blocks.{}.txt_mod.lin": (["transformer_blocks.{}.norm1_context.linear"], 1, [6]),
    "double_blocks.{}.img_attn.qkv": ([f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"], 1, [1, 1, 1]),
    "double_blocks.{}.txt_attn.qkv": ([f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"], 1, [1, 1, 1]),
    "double_blocks.{}.img_attn.proj": (["transformer_blocks.{}.attn.to_out.0"], 1, [1]),
    "double_blocks.{}.txt_attn.proj": (["transformer_blocks.{}.attn.to_add_out"], 1, [1]),
    "double_blocks.{}.img_mlp.0": (["transformer_blocks.{}.ff.net.0.proj"], 1, [4]),
    "double_blocks.{}.img_mlp.2": (["transformer_blocks.{}.ff.net.2"], 4, [1]),
    "double_blocks.{}.txt_mlp.0": (["transformer_blocks.{}.ff_context.net.0.proj"], 1, [4]),
    "double_blocks.{}.txt_mlp.2": (["transformer_blocks.{}.ff_context.net.2"], 4, [1]),
    "single_blocks.{}.modulation.lin": (["single_transformer_blocks.{}.norm.linear"], 1, [3]),
    "single_blocks.{}.linear1": (
        [f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"] + ["single_transformer_blocks.{}.proj_mlp"],
        1,
        [1, 1, 1, 4],
    ),
    "single_blocks.{}.linear2": (["single_transformer_blocks.{}.proj_out"], 5, [1]),
}
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",  # without its MLP rows
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}
Pair = tuple[np.ndarray, np.ndarray]


class Lora:
    """Random factors of every layer: `fused` {Black Forest Labs' layer: (A [R, i], B [o, R])}."""

    def __init__(self, rank: int = 2, blocks: tuple[int, int] = (1, 1), width: int = WIDTH, seed: int = 0):
        random = np.random.default_rng(seed)
        self.rank, self.width, self.fused = rank, width, {}
        for name, (_, inputs, outputs) in LAYERS.items():
            for block in range(blocks[name.startswith("single")]):
                i, o = inputs * width, sum(outputs) * width
                self.fused[name.format(block)] = (
                    random.normal(size=(rank, i)).astype(np.float32) * i**-0.5,
                    random.normal(size=(o, rank)).astype(np.float32),
                )

    def layers(self) -> dict[str, Pair]:
        """{diffusers' layer: (A, B)}."""
        found = {}
        for name, (a, b) in self.fused.items():
            form, block = form_of(name)
            parts, _, outputs = LAYERS[form]
            for part, rows in zip(parts, np.split(b, np.cumsum(outputs)[:-1] * self.width)):
                found[part.format(block)] = (a, rows)
        return found

    def xlabs(self) -> dict[str, Pair]:
        pairs = {}
        for theirs, ours in XLABS.items():
            for block in {form_of(name)[1] for name in self.fused if form_of(name)[0] == ours}:
                a, b = self.fused[ours.format(block)]
                pairs[theirs.format(block)] = (a, b[: 3 * self.width] if "qkv" in theirs else b)
        return pairs


def form_of(name: str) -> tuple[str, int]:
    """ "double_blocks.3.img_mlp.0" -> ("double_blocks.{}.img_mlp.0", 3)."""
    stack, block, rest = name.split(".", 2)
    return f"{stack}.{{}}.{rest}", int(block)


def cut_up(lora: Lora) -> dict[str, Pair]:
    """OneTrainer's newer names: parts of fused layers are numbered."""
    pairs = {}
    for name, (a, b) in lora.fused.items():
        outputs = LAYERS[form_of(name)[0]][2]
        parts = np.split(b, np.cumsum(outputs)[:-1] * lora.width)
        pairs |= {name: (a, b)} if len(parts) == 1 else {f"{name}.{k}": (a, part) for k, part in enumerate(parts)}
    return pairs


def flat(name: str) -> str:
    return name.replace(".", "_")


def same(name: str) -> str:
    return name


def named(
    pairs: dict[str, Pair],
    prefix: str,
    ends: tuple[str, str] = ("lora_A.weight", "lora_B.weight"),
    change: Callable[[str], str] = same,
    alpha: float | None = None,
) -> dict[str, np.ndarray]:
    tensors = {}
    for name, (a, b) in pairs.items():
        name = prefix + change(name)
        tensors |= {f"{name}.{ends[0]}": a, f"{name}.{ends[1]}": b}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


DOWN_UP = ("lora_down.weight", "lora_up.weight")
ALPHA = 0.75
# Name -> (tensors of a Lora, whether the file's scale is ALPHA / R, how diffusers' own loader gets to read it).
# "as it is"; a change of keys after which it does; None where it doesn't read such files.
SCHEMES: dict[str, tuple[Callable[[Lora], dict[str, np.ndarray]], bool, str | None]] = {
    "diffusers": (lambda x: named(x.layers(), "transformer."), False, "as it is"),
    "diffusers, .alpha": (lambda x: named(x.layers(), "transformer.", alpha=ALPHA), True, "as it is"),
    "diffusers, no prefix": (lambda x: named(x.layers(), ""), False, "transformer."),
    "diffusers, older ends": (
        lambda x: named(x.layers(), "transformer.", ("lora.down.weight", "lora.up.weight")),
        False,
        None,
    ),
    "PEFT": (lambda x: named(x.layers(), "base_model.model."), False, None),
    "PEFT, adapter's name": (
        lambda x: named(
            x.layers(), "base_model.model.transformer.", ("lora_A.default.weight", "lora_B.default.weight")
        ),
        False,
        None,
    ),
    "kohya": (lambda x: named(x.fused, "lora_unet_", DOWN_UP, flat, ALPHA), True, "as it is"),
    "kohya, no alpha": (lambda x: named(x.fused, "lora_unet_", DOWN_UP, flat), False, "as it is"),
    "ComfyUI": (lambda x: named(x.fused, "diffusion_model.", DOWN_UP, alpha=ALPHA), True, "as it is"),
    "ComfyUI, lora_A": (lambda x: named(x.fused, "diffusion_model.", alpha=ALPHA), True, "lora_down"),
    "ai-toolkit": (lambda x: named(x.layers(), "diffusion_model."), False, None),
    "OneTrainer": (lambda x: named(x.layers(), "lora_transformer_", DOWN_UP, flat, ALPHA), True, "attention"),
    "OneTrainer, dots": (lambda x: named(x.layers(), "lora_transformer.", DOWN_UP, alpha=ALPHA), True, None),
    "OneTrainer, newer": (lambda x: named(cut_up(x), "transformer.", DOWN_UP, alpha=ALPHA), True, None),
    "OneTrainer, no prefix": (lambda x: named(cut_up(x), "", DOWN_UP, alpha=ALPHA), True, None),
    "LyCORIS": (lambda x: named(x.layers(), "lycoris_", DOWN_UP, flat, ALPHA), True, None),
    "XLabs": (lambda x: named(x.xlabs(), "", ("down.weight", "up.weight")), False, "as it is"),
    "Black Forest Labs": (lambda x: named(x.fused, ""), False, "lora_down"),
    "Black Forest Labs, PEFT": (lambda x: named(x.fused, "base_model.model."), False, None),
}


def write(path: Path, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    safetensors.numpy.save_file(tensors, path, {"format": "pt", **metadata})
    return path


def peft_header(**settings) -> str:
    """What diffusers writes as lora_adapter_metadata."""
    whole = {
        "peft_type": "LORA",
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_bias": False,
        "target_modules": ["to_q"],
    } | settings
    return json.dumps({f"transformer.{name}": value for name, value in whole.items()})


def relative(found: Pair, expected: Pair) -> float:
    """‖B A − B′ A′‖ / ‖B′ A′‖ (Frobenius) in float64, from the factors alone."""

    def norm(b: np.ndarray, a: np.ndarray) -> float:
        return float(np.linalg.norm(np.linalg.qr(b, mode="r") @ np.linalg.qr(a.T, mode="r").T))

    (a, b), (a_, b_) = (tuple(x.astype(np.float64) for x in pair) for pair in (found, expected))
    return norm(np.hstack([b, -b_]), np.vstack([a, a_])) / norm(b_, a_)
