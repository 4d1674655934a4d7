"""SigLIP's vision tower (Zhai et al., arXiv 2303.15343; SigLIP 2 of fixed resolution, arXiv 2502.14786).

Patches -> blocks -> final norm -> attention pooling by one learnt probe. Letters: b batch, s patches, d width.
Paths are transformers' SiglipVisionModel names with the layer index as a leading axis; TABLE is the conversion.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import (
    Between,
    Blocks,
    Epsilon,
    Heads,
    Pixels,
    Width,
    as_dataclass,
    checked,
    read_json,
    shown,
)
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.state import build, shapes
from lorweb_jax.files.table import CONV, LINEAR, Row, Stored
from lorweb_jax.models.encoder_block import Attention, Block, FeedForward, block_rows, require_heads, rows
from lorweb_jax.nn.layers import Conv, Embedding, LayerNorm, Weight, scan_stack, stack_outputs, stacked


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes, named as in config.json's vision_config; the defaults, which published files leave out, are base's."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    num_hidden_layers: Blocks = 12
    num_attention_heads: Heads = 12
    num_channels: Annotated[int, Between(3, 3)] = 3
    image_size: Pixels = 224
    patch_size: Pixels = 16
    layer_norm_eps: Epsilon = 1e-6

    def __post_init__(self):
        require_heads(self, "a SigLIP tower")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "SiglipConfig":
        """From a SiglipModel's or SiglipVisionModel's config.json. Raises UserError for anything else."""
        path = Path(folder) / "config.json"
        data = read_json(path)
        if data.get("model_type") not in ("siglip", "siglip_vision_model"):
            raise UserError(
                f"{folder} holds a model of type {shown(data.get('model_type'))}, expected a SigLIP of fixed "
                "resolution; give a folder like siglip2-base-patch16-224"
            )
        return as_dataclass(checked(data.get("vision_config", data), _SiglipFile, path), cls)


@dataclass(frozen=True)
class _SiglipFile(SiglipConfig):
    """config.json, or its vision_config."""

    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"


_gelu = partial(jax.nn.gelu, approximate=True)


class PoolingHead(nnx.Module):
    """One learnt probe attends to all patches, then x + feed forward(norm x)."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.probe = Weight(jax.random.normal(rngs.params(), (1, 1, config.hidden_size)))
        self.attention = Attention(config, rngs=rngs)
        self.layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.mlp = FeedForward(config, _gelu, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [b, s, d] -> [b, d]."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (x.shape[0], 1, x.shape[2]))
        pooled = self.attention(probe, x)
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]


class SiglipVision(nnx.Module):
    """Pixel values -> the pooled embedding, or every layer's patch tokens."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        self.config = config
        grid = config.image_size // config.patch_size
        self.patch_embedding = Conv(
            config.num_channels,
            config.hidden_size,
            config.patch_size,
            stride=config.patch_size,
            padding="VALID",
            rngs=rngs,
        )
        self.position_embedding = Embedding(grid * grid, config.hidden_size, rngs=rngs)
        self.layers = stacked(lambda rngs: Block(config, _gelu, rngs=rngs), config.num_hidden_layers, rngs)
        self.post_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(config, rngs=rngs)

    @property
    def embedding_width(self) -> int:
        return self.config.hidden_size

    @property
    def patch_width(self) -> int:
        return self.config.hidden_size

    def _embedded(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        positions = self.position_embedding.embedding[...].astype(pixels.dtype)
        return patches.reshape(pixels.shape[0], -1, patches.shape[-1]) + positions

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixel values float32 [b, h, w, 3] from the folder's ImageProcessor -> pooled embedding [b, d]."""
        x = scan_stack(self.layers, lambda block, x, _: block(x), self._embedded(pixels))
        return self.head(self.post_layernorm(x))

    def hidden_states(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """pixel values [b, h, w, 3] -> the embeddings and each layer's output, [b, s, d], not normalised."""
        return stack_outputs(self.layers, self._embedded(pixels))


_HEAD = "vision_model.head."
# The conversion (lorweb_jax.files.table). torch's MultiheadAttention fuses the head's q, k and v.
TABLE = [
    *rows("patch_embedding", "vision_model.embeddings.patch_embedding", CONV),
    *block_rows("vision_model"),
    *rows("post_layernorm", "vision_model.post_layernorm"),
    Row("head.probe", f"{_HEAD}probe"),
    *[
        Row(f"head.attention.{name}.kernel", f"{_HEAD}attention.in_proj_weight", LINEAR)
        for name in ("q_proj", "k_proj", "v_proj")
    ],
    *[Row(f"head.attention.{name}.bias", f"{_HEAD}attention.in_proj_bias") for name in ("q_proj", "k_proj", "v_proj")],
    *[
        row
        for name in ("attention.out_proj", "mlp.fc1", "mlp.fc2")
        for row in rows(f"head.{name}", _HEAD + name, LINEAR)
    ],
    *rows("head.layernorm", f"{_HEAD}layernorm"),
]


def open_siglip(folder: str | Path) -> tuple[SiglipConfig, Stored]:
    """(config, weights that are not yet read) of a SiglipModel's or SiglipVisionModel's folder."""
    config, checkpoint = SiglipConfig.from_folder(folder), Checkpoint(folder)
    ignored = [key for key in checkpoint if not key.startswith("vision_model.") or key.endswith("position_ids")]
    return config, Stored(checkpoint, TABLE, shapes(lambda: SiglipVision(config, rngs=nnx.Rngs(0))), ignored)


def load_siglip(folder: str | Path, dtype: Any = None) -> SiglipVision:
    """The vision tower of a folder with single or sharded safetensors. Raises UserError if it doesn't fit."""
    config, stored = open_siglip(folder)
    return build(lambda: SiglipVision(config, rngs=nnx.Rngs(0)), stored.load(dtype), str(folder))
