"""All that an analogy runs through: image encoder, text encoders, autoencoder, transformer and basis, in one module.

images → latents → tokens → transformer + low-rank adapters → velocity. Training and sampling call the same methods.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.adapters.basis import Basis
from lorweb_jax.flow.sampling import euler
from lorweb_jax.images.levels import to_float
from lorweb_jax.models.autoencoder.packing import pack, position_ids, text_ids, unpack
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.nn.layers import Adapter


class AnalogyModel(nnx.Module):
    """The frozen parts of a FLUX Kontext pipeline and, where there is one, a basis.

    Parts that a use doesn't need may be None. `dtype` is what the transformer and the text encoders compute in; the
    autoencoder and the router compute in float32.
    """

    def __init__(
        self,
        *,
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
        self.processor, self.dtype = processor, jnp.dtype(dtype)

    def prompt(self, clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids [b, 77] and [b, t] -> text [b, t, j] and pooled [b, p]."""
        return (self.text_encoder_2(t5_ids, dtype=self.dtype), self.text_encoder(clip_ids).astype(self.dtype))

    def latents(self, images: jax.Array) -> jax.Array:
        """uint8 images [b, H, W, 3] -> latents float32 [b, H/f, W/f, c], the mode of the autoencoder's posterior."""
        return self.vae.latents(to_float(images))

    def tokens(self, images: jax.Array) -> jax.Array:
        """uint8 images [b, H, W, 3] -> packed latents float32 [b, s, 4c]."""
        return pack(self.latents(images))

    def images(self, tokens_bsc: jax.Array, height: int, width: int) -> jax.Array:
        """Packed latents -> images [b, height, width, 3] in −1..1."""
        factor = self.vae.config.downscale
        return self.vae.image(unpack(tokens_bsc, height // factor, width // factor))

    def query(self, views: jax.Array) -> jax.Array:
        """What the image encoder says of an analogy: views uint8 [b, v, h, w, 3] (queries.views) -> [b, q]."""
        return queries.query(self.basis.config.query_mode, self.image_encoder, self.processor.normalised(views))

    def adapters(self, query_bq: jax.Array | None, batch: int) -> dict[str, Adapter] | None:
        """What the basis adds to each linear layer, its coefficients computed once; None without a basis."""
        if self.basis is None:
            return None
        return self.basis.adapters(self.basis.coefficients(query_bq, batch))

    def velocity(
        self,
        noisy_bsc: jax.Array,
        condition_bsc: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        time_b: jax.Array,
        guidance_b: jax.Array,
        size: tuple[int, int],
        adapters: dict[str, Adapter] | None = None,
    ) -> jax.Array:
        """Velocity of the noisy tokens, float32 [b, s, c]; `size` = (height, width) of the grid in pixels."""
        modulations = self.transformer.modulations(pooled, time_b, guidance_b, adapters)
        return self._velocity(noisy_bsc, condition_bsc, text, modulations, size, adapters)

    def _velocity(self, noisy_bsc, condition_bsc, text, modulations, size, adapters) -> jax.Array:
        height, width = (side // self.vae.config.downscale for side in size)
        ids = jnp.concatenate([position_ids(height, width, 0), position_ids(height, width, 1)])
        hidden = jnp.concatenate([noisy_bsc, condition_bsc], axis=1).astype(self.dtype)
        velocity = self.transformer.velocity(hidden, text, modulations, ids, text_ids(text.shape[1]), adapters)
        return velocity[:, : noisy_bsc.shape[1]].astype(jnp.float32)

    def sample(
        self,
        noise_bsc: jax.Array,
        condition_bsc: jax.Array,
        text: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array,
        sigmas: jax.Array,
        size: tuple[int, int],
        adapters: dict[str, Adapter] | None = None,
        *,
        round_to_bfloat16: bool = False,
    ) -> jax.Array:
        """Tokens of the finished grid, float32 [b, s, c], by Euler steps over `sigmas` [steps + 1].

        The modulations of all steps, which depend on the noise level alone, come out of one product beforehand.
        """
        guidance_b = jnp.broadcast_to(guidance, noise_bsc.shape[:1])

        def modulations(sigma):
            return self.transformer.modulations(
                pooled, jnp.broadcast_to(sigma, guidance_b.shape), guidance_b, adapters, round_to_bfloat16
            )

        def velocity(z, modulations):
            return self._velocity(z, condition_bsc, text, modulations, size, adapters)

        return euler(velocity, noise_bsc, sigmas, jax.vmap(modulations)(jnp.asarray(sigmas)[:-1]))
