"""What one row of the benchmark measures: the model's sizes, the batch and how it is computed."""

import dataclasses
from typing import Any

from lorweb_jax.adapters.basis import BasisConfig
from lorweb_jax.models.backbone import Backbone
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone

SIZES = {
    # The small base of configs/base_transformer.py.
    "tiny": FluxConfig(
        num_layers=2,
        num_single_layers=6,
        num_attention_heads=4,
        attention_head_dim=32,
        joint_attention_dim=96,
        pooled_projection_dim=96,
        axes_dims_rope=(8, 12, 12),
    ),
    # 0.16 B parameters: a forward at 512 + 128 tokens is of the order of a second on two CPU cores.
    "mid": FluxConfig(num_layers=4, num_single_layers=8, num_attention_heads=6, joint_attention_dim=1024),
    "kontext": FluxConfig(),
}

# Noisy and conditioning tokens, text tokens, batch, remat, and how many scanned blocks are compiled side by side.
# 8,192 tokens are a grid of 1024 px and its condition, 2,048 one of 512 px.
DEFAULTS = {
    ("tiny", "sample"): (32, 16, 1, "none", 8),
    ("tiny", "train"): (32, 16, 8, "none", 8),
    ("mid", "sample"): (512, 128, 1, "none", 1),
    ("mid", "train"): (512, 128, 1, "none", 1),
    ("kontext", "sample"): (8192, 512, 1, "none", 1),
    ("kontext", "train"): (2048, 512, 6, "full", 1),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a measuring process is told. `tokens` counts noisy and conditioning tokens, half of each; `threads`
    CPU threads; `attention` one of attention.IMPLEMENTATIONS; `quantization` one of quantization.KINDS, of the blocks'
    frozen linear layers; `moments` what the optimizer keeps its moments in; `unstacked` whether each
    block has arrays of its own."""

    size: str
    what: str
    dtype: str
    tokens: int
    text_tokens: int
    batch: int
    repeats: int
    basis_size: int
    basis_rank: int
    quantization: str
    moments: str
    remat: str
    unroll: int
    attention: str
    threads: int
    unstacked: bool = False

    @property
    def model(self) -> FluxConfig:
        return SIZES[self.size]

    @property
    def backbone(self) -> Backbone:
        return backbone(self.model)

    @property
    def basis(self) -> BasisConfig:
        """The paper's router (cat-aa'b of a CLIP ViT-L/14: queries 2304 wide)."""
        return BasisConfig(size=self.basis_size, rank=self.basis_rank)

    @property
    def length(self) -> int:
        """Of the sequence that attention sees."""
        return self.tokens + self.text_tokens

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
