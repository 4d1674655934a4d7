"""The FLUX.1 Kontext transformer (diffusers' FluxTransformer2DModel): noisy and conditioning tokens -> velocity."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import Between, Blocks, Heads, Width, checked, given, require_class
from lorweb_jax.models.flux1.blocks import DoubleBlock, OutputNorm, SingleBlock
from lorweb_jax.models.flux1.embeddings import TimeTextEmbedding, rotary
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Adapter, Linear, map_stack, scan_stack, stacked


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
        found = checked(values, _FluxFile, source)
        if found.out_channels not in (None, found.in_channels):
            raise UserError(
                f"{source}: out_channels is {found.out_channels} and in_channels {found.in_channels}; only "
                "as many output as input channels are supported: use a FLUX.1 Kontext folder"
            )
        return given(found, cls)

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


class LinearShape(NamedTuple):
    """A stack of equal linear layers: l layers from width i to width o."""

    depth: int
    inputs: int
    outputs: int


def block_linears(config: FluxConfig) -> dict[str, LinearShape]:
    """Every linear layer inside the blocks, 14 kinds in double and 6 in single blocks (method.md §3)."""
    d, double, single = config.features, config.num_layers, config.num_single_layers
    shapes = dict.fromkeys(("norm1.linear", "norm1_context.linear"), (d, 6 * d))
    shapes |= {
        f"attn.{name}": (d, d)
        for name in ("to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "add_q_proj", "to_out_0", "to_add_out")
    }
    for name in ("ff", "ff_context"):
        shapes |= {f"{name}.net_0_proj": (d, 4 * d), f"{name}.net_2": (4 * d, d)}
    layers = {f"transformer_blocks.{name}": LinearShape(double, *io) for name, io in shapes.items() if double}
    shapes = {"norm.linear": (d, 3 * d), "proj_mlp": (d, 4 * d), "proj_out": (5 * d, d)}
    shapes |= {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
    return layers | {
        f"single_transformer_blocks.{name}": LinearShape(single, *io) for name, io in shapes.items() if single
    }


class Modulations(NamedTuple):
    """Scales, shifts and gates of every block: {layer: [l, b, count·d]} of each stack, and the last layer's [b, 2d]."""

    double: dict[str, jax.Array]
    single: dict[str, jax.Array]
    output: jax.Array


class Flux(nnx.Module):
    """FLUX.1 Kontext. `remat` is a key of layers.REMAT_POLICIES, `attention` an implementation of
    attention.attend, `unroll` how many scanned blocks are compiled side by side, `quantization` one of
    quantization.KINDS, for the linear layers inside the blocks (`block_linears`).

    The blocks' modulations depend on the timestep, guidance and pooled text alone: they are computed for all blocks
    in one product a stack, ahead of the blocks, and when sampling ahead of all steps (`modulations`).
    """

    def __init__(
        self,
        config: FluxConfig,
        *,
        remat: str = "none",
        attention: str = "xla",
        unroll: int = 1,
        quantization: str = "none",
        rngs: nnx.Rngs,
    ):
        self.config, self.remat, self.unroll = config, remat, unroll
        d, heads = config.features, config.num_attention_heads
        self.x_embedder = Linear(config.in_channels, d, rngs=rngs)
        self.context_embedder = Linear(config.joint_attention_dim, d, rngs=rngs)
        self.time_text_embed = TimeTextEmbedding(config.pooled_projection_dim, d, config.guidance_embeds, rngs=rngs)
        self.transformer_blocks = stacked(
            lambda rngs: DoubleBlock(d, heads, attention, quantization, rngs=rngs), config.num_layers, rngs
        )
        self.single_transformer_blocks = stacked(
            lambda rngs: SingleBlock(d, heads, attention, quantization, rngs=rngs), config.num_single_layers, rngs
        )
        self.norm_out = OutputNorm(d, rngs=rngs)
        self.proj_out = Linear(d, config.in_channels, rngs=rngs)

    def __call__(
        self,
        hidden_bsc: jax.Array,
        text_btj: jax.Array,
        pooled_bp: jax.Array,
        timestep_b: jax.Array,
        guidance_b: jax.Array | None,
        image_ids_s3: jax.Array,
        text_ids_t3: jax.Array,
        adapters: dict[str, Adapter] | None = None,
        *,
        round_to_bfloat16: bool = False,
    ) -> jax.Array:
        """The velocity of every token, [b, s, c].

        Args:
          hidden_bsc: noisy tokens, then conditioning tokens, c = in_channels.
          text_btj: T5's hidden states, j = joint_attention_dim.
          pooled_bp: CLIP's pooled text, p = pooled_projection_dim.
          timestep_b: in 0..1. guidance_b: as given by the user (2.5, not 2500).
          image_ids_s3, text_ids_t3: position ids (t, y, x).
          adapters: by path in `block_linears`, each with a leading axis l; None for the plain model.
          round_to_bfloat16: see TimeTextEmbedding.
        """
        modulations = self.modulations(pooled_bp, timestep_b, guidance_b, adapters, round_to_bfloat16)
        return self.velocity(hidden_bsc, text_btj, modulations, image_ids_s3, text_ids_t3, adapters)

    def modulations(
        self,
        pooled_bp: jax.Array,
        timestep_b: jax.Array,
        guidance_b: jax.Array | None,
        adapters: dict[str, Adapter] | None = None,
        round_to_bfloat16: bool = False,
    ) -> Modulations:
        """All that the timestep changes: {stack: {layer: [l, b, count·d]}} and the last layer's [b, 2d]."""
        vector = self.time_text_embed(timestep_b, guidance_b, pooled_bp, round_to_bfloat16)
        # Few rows and a quarter of all weights: every device makes its share of the outputs for the rows of all who
        # share the weights with it, so that rows travel, not weights.
        vector = sharding.constrain(vector, "data", None)

        def of_stack(stack: str) -> dict[str, jax.Array]:
            blocks, add = getattr(self, stack), _within(stack, adapters or {})
            made = {}
            for name in blocks.MODULATIONS:
                layers = getattr(blocks, name)
                # A row for each layer: a product batched over l reads the kernels [l, i, o] as they lie, where one
                # of a shared row would have them transposed first.
                rows = jnp.broadcast_to(vector, (layers.linear.kernel.shape[0], *vector.shape))
                made[name] = map_stack(layers, lambda layer, xs: layer(*xs), (rows, add.get(f"{name}.linear")))
            for rows, features in (("data", ("fsdp", "tensor")), ("data", "fsdp"), ("batch", None)):
                made = {name: sharding.constrain(y, None, rows, features) for name, y in made.items()}
            return made

        return Modulations(
            of_stack("transformer_blocks"),
            of_stack("single_transformer_blocks"),
            sharding.constrain(self.norm_out.vectors(vector), "batch", None),
        )

    def velocity(
        self,
        hidden_bsc: jax.Array,
        text_btj: jax.Array,
        modulations: Modulations,
        image_ids_s3: jax.Array,
        text_ids_t3: jax.Array,
        adapters: dict[str, Adapter] | None = None,
    ) -> jax.Array:
        """`__call__` for modulations that are known."""

        def placed(x):
            return sharding.constrain(x, "batch", None, None)

        image, text = placed(self.x_embedder(hidden_bsc)), placed(self.context_embedder(text_btj))
        rope = rotary(jnp.concatenate([text_ids_t3, image_ids_s3]), self.config.axes_dims_rope)
        length = text.shape[1]

        def double(block, streams, slices):
            image, text = block(*streams, slices[0], rope, slices[1])
            return placed(image), placed(text)

        def single(block, x, slices):
            return placed(block(x, slices[0], rope, slices[1], length))

        def scan(stack, body, carry, mods):
            blocks = getattr(self, stack)
            add = {
                name: adapter
                for name, adapter in _within(stack, adapters or {}).items()
                if name.removesuffix(".linear") not in blocks.MODULATIONS
            }
            return scan_stack(
                blocks,
                body,
                carry,
                (mods, add),
                without=blocks.MODULATIONS,
                prepare=functools.partial(sharding.gathered, within=stack),
                remat=self.remat,
                unroll=self.unroll,
            )

        with jax.named_scope("double_blocks"):
            image, text = scan("transformer_blocks", double, (image, text), modulations.double)
        with jax.named_scope("single_blocks"):
            x = scan("single_transformer_blocks", single, jnp.concatenate([text, image], axis=1), modulations.single)
        return self.proj_out(self.norm_out(x[:, length:], modulations.output))


def _within(stack: str, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    return {
        path.removeprefix(f"{stack}."): adapter for path, adapter in adapters.items() if path.startswith(f"{stack}.")
    }
