"""What Pair Customization trains through: transformer and autoencoder, both captions' embeddings, and the members."""

import jax
import jax.numpy as jnp

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.members import Members
from lorweb_jax.flow.loss import add_noise
from lorweb_jax.models.backbone import Backbone
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Kept
from lorweb_jax.pipeline.model import AnalogyModel, Size

# Weights of the members in the pass of each (method.md §7).
PASSES = {"content": {"content": 1.0}, "style": {"content": 1.0, "style": 1.0}}


class PairModel(AnalogyModel):
    """The text encoders' places are taken by what they say of the captions: text [2, t, j] and pooled [2, p], in the
    order of `pair.MEMBERS`. The basis is `Members`."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        transformer,
        vae,
        members: Members,
        text: jax.Array,
        pooled: jax.Array,
        dtype=jnp.float32,
    ):
        super().__init__(
            backbone=backbone,
            transformer=transformer,
            vae=vae,
            text_encoder=None,
            text_encoder_2=None,
            image_encoder=None,
            basis=members,
            processor=None,
            dtype=dtype,
        )
        self.text, self.pooled = Kept(text), Kept(pooled)

    def pass_velocity(
        self,
        member: str,
        x0_bsc: jax.Array,
        noise_bsc: jax.Array,
        time_b: jax.Array,
        guidance: float,
        size: Size,
        references_bsc: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity [b, s, c] of a member's pass at (1 − t)·x0 + t·ε, with its caption and the weights of PASSES; the
        pass's target is ε − x0. size: of the images, in pixels."""
        batch, number = x0_bsc.shape[0], pair.MEMBERS.index(member)
        text, pooled = (
            sharding.constrain(jnp.repeat(said[number][None], batch, axis=0), "batch", *[None] * (said.ndim - 1))
            for said in (self.text[...], self.pooled[...])
        )
        return self.velocity(
            add_noise(x0_bsc, noise_bsc, time_b),
            references_bsc,
            text,
            pooled,
            time_b,
            jnp.full(batch, guidance, jnp.float32),
            size,
            self.basis.adapters(self.basis.row(PASSES[member], batch)),
        )
