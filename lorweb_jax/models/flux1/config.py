"""Sizes of a FLUX.1 transformer."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Blocks, Heads, Width, as_dataclass, checked, require_class


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes, named as in diffusers' transformer/config.json; the defaults are FLUX.1 Kontext's."""

    in_channels: Width = 64
    num_layers: Blocks = 19
    num_single_layers: Blocks = 38
    attention_head_dim: Annotated[int, Between(2, 4096)] = 128
    num_attention_heads: Heads = 24
    joint_attention_dim: Width = 4096
    pooled_projection_dim: Width = 768
    guidance_embeds: bool = True
    axes_dims_rope: Annotated[tuple[Annotated[int, Between(0, 4096)], ...], Between(3, 3)] = (16, 56, 56)

    def __post_init__(self):
        if sum(self.axes_dims_rope) != self.attention_head_dim or any(dim % 2 for dim in self.axes_dims_rope):
            raise UserError(
                f"axes_dims_rope is {self.axes_dims_rope}; its parts must be even and add up to "
                f"attention_head_dim = {self.attention_head_dim}; correct transformer/config.json"
            )

    @property
    def features(self) -> int:
        """The model width d."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, values: dict[str, Any], source: str | Path = "transformer/config.json") -> "FluxConfig":
        """From diffusers' config.json, called `source` in messages; what is left out is as diffusers has it.

        Raises UserError for a wrong type or size, and where it asks for something FLUX Kontext hasn't got.
        """
        require_class(values, "FluxTransformer2DModel", source)
        sizes = checked(values, _FluxFile, source)
        if sizes.out_channels not in (None, sizes.in_channels):
            raise UserError(
                f"{source}: out_channels is {sizes.out_channels} and in_channels {sizes.in_channels}; only "
                "as many output as input channels are supported: use a FLUX.1 Kontext folder"
            )
        return as_dataclass(sizes, cls)

    def to_json(self) -> dict[str, Any]:
        """What diffusers' config.json holds."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": "0.35.1",
            "patch_size": 1,
            "out_channels": None,
            **dataclasses.asdict(self),
            "axes_dims_rope": list(self.axes_dims_rope),
        }


@dataclasses.dataclass(frozen=True)
class _FluxFile(FluxConfig):
    """config.json, with what it may say only in one way."""

    guidance_embeds: bool = False
    patch_size: Annotated[int, Between(1, 1)] = 1
    out_channels: Width | None = None


def black_forest_config(shapes: Mapping[str, tuple[int, ...]], where: str = "the file") -> dict[str, Any]:
    """diffusers' config.json of a Black Forest Labs file, which has none, from its tensors' shapes.

    The rope axes leave no trace in the tensors: 16/56/56 is assumed, which needs heads of width 128. Raises UserError
    where a tensor that tells a size is missing, or the head width is another.
    """

    def blocks(kind: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(kind + ".")})

    try:
        width, in_channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        joint, pooled = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
        out_channels = shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else "has tensors of other shapes"
        raise UserError(
            f"{where} {missing}; give a whole FLUX transformer in Black Forest Labs' layout, such "
            "as flux1-kontext-dev.safetensors"
        ) from None
    if in_channels != out_channels:
        raise UserError(
            f"{where} takes {in_channels} channels and gives {out_channels}, as FLUX.1 Fill, Depth and "
            "Canny do; give FLUX.1 Kontext or dev"
        )
    if head != 128:
        raise UserError(
            f"{where} has attention heads of width {head}, and rope axes are known only for 128; give "
            "diffusers' config.json with --model-config"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None,
        "num_layers": blocks("double_blocks"),
        "num_single_layers": blocks("single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, 56, 56],
    }
