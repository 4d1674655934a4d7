"""The autoencoder's parameters in diffusers' layout and in Black Forest Labs' `ae.safetensors`.

The latter counts the decoder's blocks from the image inwards, names resnets `block`, and stores the attention's
linear layers as 1x1 convolutions.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.table import CONV, LINEAR, Row

_CONVS, _NORMS, _LINEARS = ("conv1", "conv2"), ("norm1", "norm2"), ("to_q", "to_k", "to_v", "to_out_0")
_ATTENTION_NAMES = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out_0": "proj_out"}


def diffusers(blocks: int, layers: int) -> list[Row]:
    """The table for `blocks` resolutions of `layers` resnets each (one more in the decoder)."""
    return [
        row
        for path, _, kind in _layers(blocks, layers)
        for row in _rows(path, path.replace("to_out_0", "to_out.0"), kind, LINEAR)
    ]


def black_forest(blocks: int, layers: int) -> list[Row]:
    """The same for `ae.safetensors`."""
    return [row for path, theirs, kind in _layers(blocks, layers) for row in _rows(path, theirs, kind, CONV)]


def _rows(path: str, key: str, kind: str, linear_axes: tuple[int, ...]) -> list[Row]:
    weight = {
        "conv": Row(f"{path}.kernel", f"{key}.weight", CONV),
        "norm": Row(f"{path}.scale", f"{key}.weight"),
        "linear": Row(f"{path}.kernel", f"{key}.weight", linear_axes),
    }[kind]
    return [weight, Row(f"{path}.bias", f"{key}.bias")]


def _layers(blocks: int, layers: int) -> Iterator[tuple[str, str, str]]:
    """(our path, Black Forest Labs' name, kind) of every layer that such an autoencoder can have."""
    for half in ("encoder", "decoder"):
        yield f"{half}.conv_in", f"{half}.conv_in", "conv"
        for j in range(2):
            yield from _resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}")
        for name, theirs in _ATTENTION_NAMES.items():
            kind = "linear" if name in _LINEARS else "norm"
            yield f"{half}.mid_block.attentions.0.{name}", f"{half}.mid.attn_1.{theirs}", kind
        yield f"{half}.conv_norm_out", f"{half}.norm_out", "norm"
        yield f"{half}.conv_out", f"{half}.conv_out", "conv"
    for i in range(blocks):
        down, up, outermost = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}", blocks - 1 - i
        for j in range(layers):
            yield from _resnet(f"{down}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        for j in range(layers + 1):
            yield from _resnet(f"{up}.resnets.{j}", f"decoder.up.{outermost}.block.{j}")
        yield f"{down}.downsamplers.0.conv", f"encoder.down.{i}.downsample.conv", "conv"
        yield f"{up}.upsamplers.0.conv", f"decoder.up.{outermost}.upsample.conv", "conv"
    yield "quant_conv", "quant_conv", "conv"
    yield "post_quant_conv", "post_quant_conv", "conv"


def _resnet(path: str, theirs: str) -> Iterator[tuple[str, str, str]]:
    for name in _CONVS:
        yield f"{path}.{name}", f"{theirs}.{name}", "conv"
    for name in _NORMS:
        yield f"{path}.{name}", f"{theirs}.{name}", "norm"
    yield f"{path}.conv_shortcut", f"{theirs}.nin_shortcut", "conv"


def black_forest_config(shapes: Mapping[str, tuple[int, ...]], where: str = "the file") -> dict[str, Any]:
    """diffusers' vae/config.json of an `ae.safetensors`, which has none, from its tensors' shapes.

    Groups of the normalisation, shift and scale leave no trace in the tensors: FLUX's 32, 0.1159 and 0.3611 are
    assumed. Raises UserError where a tensor that tells a size is missing.
    """

    def count(prefix: str) -> int:
        return len({key.split(".")[prefix.count(".")] for key in shapes if key.startswith(prefix)})

    try:
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(count("encoder.down."))]
        latents, image = shapes["decoder.conv_in.weight"][1], shapes["encoder.conv_in.weight"][1]
    except (KeyError, IndexError) as error:
        missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else "has tensors of other shapes"
        raise UserError(
            f"{where} {missing}; give FLUX's whole autoencoder in Black Forest Labs' layout, ae.safetensors"
        ) from None
    if widths and any(width % 32 for width in widths):
        raise UserError(
            f"{where} has the widths {widths}, not multiples of FLUX's 32 normalisation groups; give "
            "diffusers' config.json with --model-config"
        )
    if latents != 16:
        raise UserError(
            f"{where} has {latents} latent channels and FLUX's 16: it is another model's; give "
            "ae.safetensors, or diffusers' config.json with --model-config"
        )
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "in_channels": image,
        "out_channels": image,
        "latent_channels": latents,
        "block_out_channels": widths,
        "layers_per_block": count("encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": 32,
        "sample_size": 1024,
        "force_upcast": True,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "latents_mean": None,
        "latents_std": None,
    }
