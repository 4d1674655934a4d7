"""All that an analogy runs through: image encoder, text encoders, autoencoder, transformer and basis, in one module.

images → latents → tokens → transformer + low-rank adapters → velocity. Training and sampling call the same methods.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.flow.sampling import SINGLE, Combine, Velocity, euler, euler_step
from lorweb_jax.images.levels import to_float
from lorweb_jax.models.backbone import Backbone
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.nn.layers import Adapter

Size = tuple[int, int]  # (height, width) in pixels
_PARTS = {"transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder", "basis"}


class AnalogyModel(nnx.Module):
    """The frozen parts of a pipeline and, where there is one, a basis. What differs between backbones is in `backbone`.

    Parts that a use doesn't need may be None. `dtype` is what the transformer and the text encoders compute in; the
    autoencoder and the router compute in float32.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        transformer: nnx.Module | None,
        vae: nnx.Module,
        text_encoder: nnx.Module | None,
        text_encoder_2: nnx.Module | None,
        image_encoder: nnx.Module | None,
        basis: Basis | None,
        processor: ImageProcessor | None,
        dtype: jnp.dtype = jnp.float32,
    ):
        self.transformer, self.vae = transformer, vae
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.image_encoder, self.basis = image_encoder, basis
        self.backbone, self.processor, self.dtype = backbone, processor, jnp.dtype(dtype)

    def replace(self, **parts: nnx.Module | None) -> "AnalogyModel":
        """The model with other parts; the rest is shared."""
        return AnalogyModel(
            **{name: getattr(self, name) for name in _PARTS} | parts,
            backbone=self.backbone,
            processor=self.processor,
            dtype=self.dtype,
        )

    def only(self, *parts: str) -> "AnalogyModel":
        """The model with these parts alone: what a jitted function takes, so that it is compiled once for all models
        that share them."""
        return self.replace(**dict.fromkeys(_PARTS - {*parts}))

    def prompt(self, clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids [b, 77] and [b, t] -> text [b, t, j] and pooled [b, p]."""
        with jax.named_scope("text"):
            return self.backbone.text((self.text_encoder, self.text_encoder_2), (clip_ids, t5_ids), self.dtype)

    def latents(self, images: jax.Array) -> jax.Array:
        """uint8 images [b, H, W, 3] -> latents float32 [b, H/f, W/f, c], the mode of the autoencoder's posterior."""
        with jax.named_scope("encode"):
            return self.backbone.latents.encode(self.vae, to_float(images))

    def tokens(self, images: jax.Array) -> jax.Array:
        """uint8 images [b, H, W, 3] -> packed latents float32 [b, s, c]."""
        return self.backbone.latents.pack(self.latents(images))

    def images(self, tokens_bsc: jax.Array, height: int, width: int) -> jax.Array:
        """Packed latents -> images [b, height, width, 3] in −1..1."""
        codec, factor = self.backbone.latents, self.vae.config.downscale
        with jax.named_scope("decode"):
            return codec.decode(self.vae, codec.unpack(tokens_bsc, height // factor, width // factor))

    def query(self, views: jax.Array) -> jax.Array:
        """What the image encoder says of an analogy: views uint8 [b, v, h, w, 3] (queries.views) -> [b, q]."""
        with jax.named_scope("query"):
            return queries.query(self.basis.config.query_mode, self.image_encoder, self.processor.normalised(views))

    def adapters(self, query_bq: jax.Array | None, batch: int) -> dict[str, Adapter] | None:
        """What the basis adds to each linear layer, its coefficients computed once; None without a basis."""
        if self.basis is None:
            return None
        return self.basis.adapters(self.basis.coefficients(query_bq, batch))

    def velocity(
        self,
        noisy_bsc: jax.Array,
        references_bsc: jax.Array | None,
        text: jax.Array,
        pooled: jax.Array,
        time_b: jax.Array,
        guidance_b: jax.Array,
        size: Size,
        adapters: dict[str, Adapter] | None = None,
        *,
        reference_sizes: tuple[Size, ...] | None = None,
    ) -> jax.Array:
        """Velocity of the noisy tokens, float32 [b, s, c].

        references_bsc: packed latents of the reference images, one image's after the other's; None for text to image.
        size: (height, width) of the image that is made, in pixels; reference_sizes: of each reference (None: one of
        `size`, such as the analogy's condition grid).
        """
        with jax.named_scope("modulations"):
            modulations = self.transformer.modulations(pooled, time_b, guidance_b, adapters)
        return self._velocity(noisy_bsc, references_bsc, text, modulations, size, adapters, reference_sizes)

    def _velocity(
        self, noisy_bsc, references_bsc, text, modulations, size, adapters=None, reference_sizes=None
    ) -> jax.Array:
        hidden, sizes = noisy_bsc, [size]
        if references_bsc is not None:
            hidden = jnp.concatenate([noisy_bsc, references_bsc], axis=1)
            sizes += [size] if reference_sizes is None else reference_sizes
        latents = [tuple(side // self.vae.config.downscale for side in each) for each in sizes]
        ids = jnp.concatenate([self.backbone.position_ids(*each, image) for image, each in enumerate(latents)])
        text_ids = self.backbone.text_ids(text.shape[1])
        velocity = self.transformer.velocity(hidden.astype(self.dtype), text, modulations, ids, text_ids, adapters)
        return velocity[:, : noisy_bsc.shape[1]].astype(jnp.float32)

    def step_modulations(
        self,
        sigmas: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array,
        adapters: dict[str, Adapter] | None = None,
        round_to_bfloat16: bool = False,
    ) -> Any:
        """The modulations of all steps, [steps, …], which depend on the noise level alone, in one product."""
        guidance_b = jnp.broadcast_to(guidance, pooled.shape[:1])

        def modulations(sigma):
            return self.transformer.modulations(
                pooled, jnp.broadcast_to(sigma, guidance_b.shape), guidance_b, adapters, round_to_bfloat16
            )

        with jax.named_scope("modulations"):
            return jax.vmap(modulations)(jnp.asarray(sigmas)[:-1])

    def step(
        self,
        z_bsc: jax.Array,
        difference: jax.Array,
        modulations: Any,
        references_bsc: jax.Array | None,
        text: jax.Array,
        size: Size,
        adapters: dict[str, Adapter] | None = None,
        *,
        combine: Combine = SINGLE,
        reference_sizes: tuple[Size, ...] | None = None,
    ) -> jax.Array:
        """One Euler step of `sample`, for one step's part of `step_modulations` and the difference of its levels."""
        velocity = self._rows_velocity(references_bsc, text, size, adapters, combine, reference_sizes)
        return euler_step(velocity, z_bsc, difference, modulations, combine)

    def sample(
        self,
        noise_bsc: jax.Array,
        references_bsc: jax.Array | None,
        text: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array,
        sigmas: jax.Array,
        size: Size,
        adapters: dict[str, Adapter] | None = None,
        *,
        combine: Combine = SINGLE,
        reference_sizes: tuple[Size, ...] | None = None,
        round_to_bfloat16: bool = False,
    ) -> jax.Array:
        """Tokens of the finished image, float32 [b, s, c], by Euler steps over `sigmas` [steps + 1], as one program.

        text [p·b, t, j] and pooled [p·b, p] are those of all passes of `combine`, pass after pass, as are the rows that
        `adapters` have coefficients for; noise and references are of one pass, the same for all. See `velocity`.
        """
        modulations = self.step_modulations(sigmas, pooled, guidance, adapters, round_to_bfloat16)
        velocity = self._rows_velocity(references_bsc, text, size, adapters, combine, reference_sizes)
        return euler(velocity, noise_bsc, sigmas, modulations, combine)

    def _rows_velocity(self, references_bsc, text, size, adapters, combine, reference_sizes) -> Velocity:
        if references_bsc is not None:
            references_bsc = jnp.tile(references_bsc, (combine.passes, 1, 1))

        def velocity(rows, modulations):
            return self._velocity(rows, references_bsc, text, modulations, size, adapters, reference_sizes)

        return velocity
