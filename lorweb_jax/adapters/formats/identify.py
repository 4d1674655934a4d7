"""What a file of weights is, by the names of its tensors, for the sentence that can't take it."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from lorweb_jax.adapters.formats import lora_names

BASIS = "a LoRWeB basis"
_USE_LORA = "give it to --basis of python -m lorweb_jax.edit, or to python -m lorweb_jax.export lora"
_USE_BFLOAT16 = "give the bfloat16 file that it was made from"
_USE_FLUX = "give a FLUX.1 transformer or autoencoder"

# What the name of some tensor holds -> (what the file is, what to do). The first that fits counts. These have names in
# common with FLUX's own files:
_NOT_FLUX = {
    r"\.lora_keys$|\.att_lora_to_q\.": (BASIS, _USE_LORA),
    r"quant_state\.bitsandbytes__(nf4|fp4)|\.(absmax|quant_map|nested_absmax)$": (
        "packed in bitsandbytes' 4 bits (NF4 or FP4)",
        _USE_BFLOAT16,
    ),
    r"\.SCB$|\.weight_format$": ("packed in bitsandbytes' int8", _USE_BFLOAT16),
    r"\.(wscales|smooth_factor|smooth_orig|proj_down)$": ("packed by SVDQuant (Nunchaku)", _USE_BFLOAT16),
    r"\.(qweight|qzeros|g_idx)$": ("packed by GPTQ or AWQ", _USE_BFLOAT16),
    r"\.weight_scale_inv$": ("in fp8 with a scale for each block", _USE_BFLOAT16),
    r"\.(weight_scale_2|weight_global_scale)$": ("packed in NVFP4", _USE_BFLOAT16),
    r"\.weight\._(data|scale)$": ("packed by quanto", _USE_BFLOAT16),
    r"controlnet_(blocks|x_embedder|single_blocks)|^control_model\.": ("a ControlNet", _USE_FLUX),
    r"ip_adapter|image_proj\.": ("an IP-Adapter", _USE_FLUX),
    r"distilled_guidance_layer": ("a Chroma transformer", _USE_FLUX),
    r"(double|single)_stream_modulation": ("a FLUX.2 transformer", _USE_FLUX),
    r"double_blocks\.\d+\.img_(mod\.linear|attn_qkv)": ("a HunyuanVideo transformer", _USE_FLUX),
    r"joint_blocks\.\d+": ("a Stable Diffusion 3 model", _USE_FLUX),
    r"transformer_blocks\.\d+\.img_(mlp|mod)\.": ("a Qwen-Image transformer", _USE_FLUX),
    r"(^|\.)blocks\.\d+\.(self_attn|cross_attn)\.": ("a Wan transformer", _USE_FLUX),
    r"(^|\.)(input|output)_blocks\.\d+\.|(^|\.)(down|up)_blocks\.\d+\.attentions\.\d+\.transformer_blocks\.": (
        "a Stable Diffusion 1, 2 or XL model",
        _USE_FLUX,
    ),
}
# And these don't, or stand beside them in all-in-one checkpoints:
_OTHERS = {
    r"^redux_(up|down)": ("FLUX.1 Redux' image adapter", _USE_FLUX),
    r"(encoder|decoder)\.block\.\d+\.layer\.\d+|(^|\.)enc\.blk\.\d+": (
        "a T5 text encoder",
        "it belongs into a pipeline folder's text_encoder_2",
    ),
    r"(^|\.)text_model\.encoder\.layers\.\d+": (
        "a CLIP or SigLIP model with its text encoder",
        "it belongs into a pipeline folder's text_encoder, or its folder is what --image-encoder takes",
    ),
    r"(^|\.)(vision_model|visual)\.": ("an image encoder", "give its folder to --image-encoder"),
    r"^(optimizer|state|exp_avg)\b": ("a training state", _USE_FLUX),
}
_FLUX = {
    r"(^|\.)single_(transformer_)?blocks\.\d+\.": ("a FLUX transformer", "give its pipeline's folder to --pipeline"),
    r"(^|\.)decoder\.up(_blocks)?\.\d+\.": ("an autoencoder", "give its pipeline's folder to --pipeline"),
}


def not_flux(names: Collection[str]) -> tuple[str, str] | None:
    """(what a file of such tensors is, what to do with it) if it is not FLUX's, whatever looks like it; else None."""
    if scheme := lora_scheme(names):
        return f"a LoRA in {scheme} names", _USE_LORA
    return _search(_NOT_FLUX, names)


def by_names(names: Collection[str], flux: bool = False) -> tuple[str, str] | None:
    """The same of any file, FLUX's own only if `flux`; None if unknown."""
    return not_flux(names) or flux and _search(_FLUX, names) or _search(_OTHERS, names)


def _search(marks: Mapping[str, tuple[str, str]], names: Collection[str]) -> tuple[str, str] | None:
    for mark, answer in marks.items():
        pattern = re.compile(mark)
        if any(pattern.search(name) for name in names):
            return answer
    return None


def lora_scheme(names: Collection[str]) -> str | None:
    """Whose names an adapter's are, of whatever kind the adapter is; None if the tensors are no adapter's."""
    keys = [key for name in names if (key := lora_names.parse(name)) and key.role not in lora_names.NOT_ADAPTERS]
    return next((key.scheme for key in keys if key.scheme), "a program's" if keys else None)


def shard(file: Path) -> str:
    """ ", one of 3 shards" for a file whose name says so, or nothing."""
    match = re.search(r"-\d{5}-of-(\d{5})\.", file.name)
    return f", one of {int(match[1])} shards" if match else ""
