"""The names that LoRA files for FLUX.1 use: which program's they are, which of our layers each means, what isn't read.

A key is PREFIX module "." PART, such as `lora_unet_` `double_blocks_0_img_attn_qkv` `.` `lora_down.weight`. One table
for each of the three; the layers themselves stand in models/flux1/record.py.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from lorweb_jax.models.flux1.record import DOUBLE, LAYERS, SINGLE

# How a key begins -> whose names these are; the longest that fits counts.
PREFIXES = {
    "transformer.": "diffusers'",
    "base_model.model.": "PEFT's",
    "base_model.model.transformer.": "PEFT's",
    "base_model.model.diffusion_model.": "PEFT's",
    "lora_unet_": "kohya's",
    "lora_transformer_": "OneTrainer's",
    "lora_transformer.": "OneTrainer's",
    "lycoris_": "LyCORIS'",
    "diffusion_model.": "ComfyUI's",
    "model.diffusion_model.": "ComfyUI's",
}
# Of these the dots within a module became underscores.
_FLATTENED = ("lora_unet_", "lora_transformer_", "lycoris_")
# Keys without any prefix, by how their module begins.
_BARE = {
    "double_blocks": "Black Forest Labs'",
    "single_blocks": "Black Forest Labs'",
    "transformer_blocks": "diffusers'",
    "single_transformer_blocks": "diffusers'",
}

# The other end of a key -> what it holds. A (?P<adapter>…) is PEFT's name of one of several LoRAs in a file.
PARTS = {
    r"lora_A(\.(?P<adapter>[^.]+))?\.weight": "down",  # [R, i]
    r"lora_B(\.(?P<adapter>[^.]+))?\.weight": "up",  # [o, R]
    r"lora_down\.weight": "down",
    r"lora_up\.weight": "up",
    r"lora(_linear_layer)?\.down\.weight": "down",
    r"lora(_linear_layer)?\.up\.weight": "up",
    r"down\.weight": "down",
    r"up\.weight": "up",
    r"alpha": "alpha",
    # What is not B A: its name, for the message that refuses it.
    r"dora_scale|lora_magnitude_vector(\.[^.]+)?(\.weight)?": "DoRA",
    r"lokr_\w+": "LoKr",
    r"hada_\w+": "LoHa",
    r"b?oft_\w+(\.\w+)*": "OFT",
    r"[ab][12]\.weight": "GLoRA",
    r"vera_lambda_\w+(\.[^.]+)?": "VeRA",
    r"lora_E(\.[^.]+)?|ranknum": "AdaLoRA",
    r"on_input|ia3_l(\.[^.]+)?": "IA3",
    r"lora_mid\.weight": "Tucker factors",
    r"lora_[AB](\.[^.]+)?\.bias": "a LoRA bias",
    r"diff|diff_b|set_weight|w_norm|b_norm": "whole differences of weights",
    r"reshape_weight": "a layer made wider",
    r"weight|bias|scale": "whole weights",
}
_PARTS = [(re.compile(rf"(?P<module>.+)\.({part})"), role) for part, role in PARTS.items()]
ROLES = ("down", "up", "alpha")
# Parts that other files than adapters have too.
NOT_ADAPTERS = ("alpha", "whole weights", "whole differences of weights")

# Adapters of the text encoders and words of their own, which files hold beside FLUX's: how keys begin -> what it is.
TEXT_ENCODERS = {
    "lora_te_": "CLIP",
    "lora_te1_": "CLIP",
    "lora_te2_": "T5",
    "lora_te3_": "T5",
    "lora_te1.": "CLIP",
    "lora_te2.": "T5",
    "text_encoder.": "CLIP",
    "text_encoder_2.": "T5",
    "text_encoders.clip_l.": "CLIP",
    "text_encoders.t5xxl.": "T5",
    "clip_l.": "CLIP",
    "t5.": "T5",
    "bundle_emb.": "learned words",
}


def _processors() -> dict[str, list[str]]:
    stacks = {"double": DOUBLE, "single": SINGLE}
    rows = [line.split() for line in _XLABS.splitlines() if line]
    return {name: [f"{stacks[name[:6]]}.{layer}" for layer in layers] for name, *layers in rows}


_XLABS = """
double_blocks.{l}.processor.qkv_lora1    attn.to_q      attn.to_k      attn.to_v
double_blocks.{l}.processor.qkv_lora2    attn.add_q_proj  attn.add_k_proj  attn.add_v_proj
double_blocks.{l}.processor.proj_lora1   attn.to_out_0
double_blocks.{l}.processor.proj_lora2   attn.to_add_out
single_blocks.{l}.processor.qkv_lora     attn.to_q      attn.to_k      attn.to_v
single_blocks.{l}.processor.proj_lora    proj_out
"""
# XLabs' names -> our paths; A's are shared by q, k and v, whose B's follow one another.
PROCESSORS = _processors()


def _modules() -> dict[str, list[str]]:
    """Every name of a layer -> our stacked paths that it stands for, in the order of B's rows."""
    modules: dict[str, list[str]] = {}
    for layer in sorted(LAYERS, key=lambda layer: layer.names["black_forest"].part):
        modules[layer.names["diffusers"].key] = [layer.path]
        modules.setdefault(layer.names["black_forest"].key, []).append(layer.path)
    for name, paths in list(modules.items()):
        if len(paths) > 1:  # OneTrainer cuts fused layers up: img_attn.qkv.0 is q
            modules |= {f"{name}.{index}": [path] for index, path in enumerate(paths)}
    return modules | dict(PROCESSORS)


_MODULES = _modules()
_INSIDE = {name: paths for name, paths in _MODULES.items() if "{l}" in name}
_OUTSIDE = {name for name in _MODULES if "{l}" not in name} | {"img_in.proj"}
# One spelling a block: "00" would be block 0 a second time.
_BLOCK = re.compile(
    r"(single_transformer_blocks|transformer_blocks|double_blocks|single_blocks)([._])"
    r"(0|[1-9][0-9]{0,3})\2(.+)"
)
# Models that LoRAs of the same formats are made for: what a module's name holds -> the model.
_OTHERS = {
    r"(down|up|input|output)_blocks|mid_block|middle_block": "Stable Diffusion 1, 2 or XL",
    r"joint_blocks": "Stable Diffusion 3",
    r"^blocks[._]\d+[._](self_attn|cross_attn|ffn)": "Wan",
    r"double_stream_modulation|single_stream_modulation": "FLUX.2",
    r"img_attn_qkv|img_attn_q\b|img_mlp[._]fc": "HunyuanVideo",
    r"img_mlp[._]net|txt_mlp[._]net": "Qwen-Image",
    r"adaln_modulation_cross_attn": "Cosmos",
    r"^layers[._]\d+[._](attention|feed_forward)": "Lumina or Z-Image",
}


class Key(NamedTuple):
    """A key of a LoRA file: which program's names (None: not known), module without prefix, part's role and adapter."""

    scheme: str | None
    prefix: str
    module: str
    role: str
    adapter: str


class Place(NamedTuple):
    """One block of one or (where they are fused) several of our stacked paths."""

    paths: tuple[str, ...]
    block: int


def parse(key: str) -> Key | None:
    """The key's parts; None if it doesn't end as any key of an adapter does."""
    matches = ((match, role) for pattern, role in _PARTS if (match := pattern.fullmatch(key)))
    match, role = next(matches, (None, None))
    if match is None:
        return None
    module = match["module"]
    prefix = max((prefix for prefix in PREFIXES if module.startswith(prefix)), key=len, default="")
    module = module.removeprefix(prefix)
    scheme = PREFIXES.get(prefix) or _BARE.get(re.split(r"[._]\d", module)[0])
    if ".processor." in module:
        scheme = "XLabs'"
    return Key(scheme, prefix, module, role, match.groupdict().get("adapter") or "")


def place(key: Key) -> Place | None:
    """Which of our layers a key means; None for a layer that is not inside the blocks."""
    match = _BLOCK.fullmatch(key.module)
    if not match:
        return None
    stack, dot, block, rest = match.groups()
    flat = key.prefix in _FLATTENED
    if flat != (dot == "_"):
        return None
    paths = (_FLAT if flat else _INSIDE).get(f"{stack}{dot}{{l}}{dot}{rest}")
    return paths and Place(tuple(paths), int(block))


def is_outside(key: Key) -> bool:
    """Whether it means a layer of FLUX.1 outside the blocks, such as the final one."""
    return key.module in (_FLAT_OUTSIDE if key.prefix in _FLATTENED else _OUTSIDE)


def text_encoder(key: str) -> str | None:
    """What a key adapts if it is no part of the transformer: CLIP, T5, learned words."""
    return next((name for prefix, name in TEXT_ENCODERS.items() if key.startswith(prefix)), None)


def other_model(keys: Iterable[str]) -> str | None:
    """The model that a LoRA was made for, where its names tell that it isn't FLUX.1."""
    for key in keys:
        if parsed := parse(key):
            for pattern, model in _OTHERS.items():
                if re.search(pattern, parsed.module) and not place(parsed):
                    return model
    return None


def _flat(name: str) -> str:
    return name.replace(".", "_")


_FLAT = {_flat(name): paths for name, paths in _INSIDE.items()}
_FLAT_OUTSIDE = {_flat(name) for name in _OUTSIDE}


def fused(paths: Iterable[str]) -> list[tuple[str, list[str]]]:
    """[(Black Forest Labs' name with "{l}", the paths that it stands for, in order)] where any of `paths` is."""
    present = set(paths)
    names = dict.fromkeys(layer.names["black_forest"].key for layer in LAYERS if layer.stack)
    return [(name, _INSIDE[name]) for name in names if present & set(_INSIDE[name])]
