"""The FLUX.1 Kontext transformer (diffusers' FluxTransformer2DModel): noisy and conditioning tokens -> velocity."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.models.backbone import Backbone
from lorweb_jax.models.flux1.blocks import DoubleBlock, OutputNorm, SingleBlock
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.embeddings import TimeTextEmbedding, rotary
from lorweb_jax.models.flux1.record import DOUBLE, SINGLE, backbone
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Adapter, Unstacked, map_stack, scan_stack, stacked


class Modulations(NamedTuple):
    """Scales, shifts and gates of every block: {layer: [l, b, count·d]} of each stack, and the last layer's [b, 2d]."""

    double: dict[str, jax.Array]
    single: dict[str, jax.Array]
    output: jax.Array


class Flux(nnx.Module):
    """FLUX.1 Kontext. `remat` is a key of layers.REMAT_POLICIES, `attention` an implementation of
    attention.attend, `unroll` how many scanned blocks are compiled side by side, `quantization` one of
    quantization.KINDS, for the linear layers inside the blocks.

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
        linear = self.backbone.maker(rngs=rngs)

        def blocks(kind: type, stack: str, depth: int):
            def block(rngs):
                linear = self.backbone.maker(stack, quantization=quantization, rngs=rngs)
                return kind(linear, config.attention_head_dim, attention, rngs=rngs)

            return stacked(block, depth, rngs)

        self.x_embedder = linear("x_embedder")
        self.context_embedder = linear("context_embedder")
        self.time_text_embed = TimeTextEmbedding(linear, config.guidance_embeds)
        self.transformer_blocks = blocks(DoubleBlock, DOUBLE, config.num_layers)
        self.single_transformer_blocks = blocks(SingleBlock, SINGLE, config.num_single_layers)
        self.norm_out = OutputNorm(linear)
        self.proj_out = linear("proj_out")

    def unstack(self) -> None:
        """Give each block arrays of its own (layers.Unstacked), but for the modulations: sampling and training
        are faster so on CPUs and GPUs, and compiling slower. Weights are moved, not copied."""
        for stack, depth in self.backbone.stacks:
            if depth:
                setattr(self, stack, Unstacked(getattr(self, stack), self.modulation_names(stack)))

    @property
    def backbone(self) -> Backbone:
        """Its record."""
        return backbone(self.config)

    def modulation_names(self, stack: str) -> list[str]:
        """The modulations of a stack's blocks: "norm1" and the like."""
        return [path.removesuffix(".linear") for path in self.backbone.modulations(stack)]

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
          adapters: by path in `backbone.adapted`, each with a leading axis l; None for the plain model.
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
        vector = sharding.constrain(vector, "vectors", None)

        def of_stack(stack: str) -> dict[str, jax.Array]:
            blocks, add = getattr(self, stack), _within(stack, adapters or {})
            vectors = {}
            for name in self.modulation_names(stack):
                layers = getattr(blocks, name)
                # A row for each layer: a product batched over l reads the kernels [l, i, o] as they lie, where one
                # of a shared row would have them transposed first.
                rows = jnp.broadcast_to(vector, (layers.linear.kernel.shape[0], *vector.shape))
                vectors[name] = map_stack(layers, lambda layer, xs: layer(*xs), (rows, add.get(f"{name}.linear")))
            for rows, features in (("vectors", "modulation"), ("vectors", ("fsdp",)), ("batch", None)):
                vectors = {name: sharding.constrain(y, None, rows, features) for name, y in vectors.items()}
            return vectors

        return Modulations(
            of_stack(DOUBLE), of_stack(SINGLE), sharding.constrain(self.norm_out.vectors(vector), "batch", None)
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

        def split(x):
            return sharding.constrain(x, "batch", "tokens", None)

        image, text = split(self.x_embedder(hidden_bsc)), split(self.context_embedder(text_btj))
        rope = rotary(jnp.concatenate([text_ids_t3, image_ids_s3]), self.config.axes_dims_rope)
        length = text.shape[1]

        def double(block, streams, slices):
            image, text = block(*streams, slices[0], rope, slices[1])
            return split(image), split(text)

        def single(block, x, slices):
            return split(block(x, slices[0], rope, slices[1], length))

        def scan(stack, body, carry, mods):
            known = self.modulation_names(stack)
            add = {
                name: adapter
                for name, adapter in _within(stack, adapters or {}).items()
                if name.removesuffix(".linear") not in known
            }
            return scan_stack(
                getattr(self, stack),
                body,
                carry,
                (mods, add),
                without=known,
                prepare=sharding.gathered,
                remat=self.remat,
                unroll=self.unroll,
            )

        with jax.named_scope("double_blocks"):
            image, text = scan(DOUBLE, double, (image, text), modulations.double)
        with jax.named_scope("single_blocks"):
            x = scan(SINGLE, single, split(jnp.concatenate([text, image], axis=1)), modulations.single)
        return self.proj_out(self.norm_out(x[:, length:], modulations.output))


def _within(stack: str, adapters: dict[str, Adapter]) -> dict[str, Adapter]:
    return {
        path.removeprefix(f"{stack}."): adapter for path, adapter in adapters.items() if path.startswith(f"{stack}.")
    }
