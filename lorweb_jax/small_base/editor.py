"""The small base's transformer with its text encoders, and the loss that trains them together."""

import operator
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.flow.loss import draw
from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import Schedule, train_timesteps, train_weights
from lorweb_jax.models.clip.towers import ClipText, CLIPTextConfig
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux, Modulations
from lorweb_jax.models.flux1.packing import pack, position_ids, text_ids, unpack
from lorweb_jax.models.flux1.record import encode_text
from lorweb_jax.models.t5.model import T5Config, T5Encoder


class EditorConfig(NamedTuple):
    flux: FluxConfig
    text: CLIPTextConfig
    text_2: T5Config


def editor_config(config, clip_words: int, t5_words: int) -> EditorConfig:
    """From configs/base_transformer.py and the sizes of the vocabularies."""
    text = CLIPTextConfig(
        **config.text,
        vocab_size=clip_words,
        projection_dim=config.text["hidden_size"],
        bos_token_id=clip_words - 2,
        eos_token_id=clip_words - 1,
        pad_token_id=clip_words - 1,
    )
    text_2 = T5Config(vocab_size=t5_words, **config.text_2)
    flux = FluxConfig(
        **(dict(config.transformer) | {"axes_dims_rope": tuple(config.transformer["axes_dims_rope"])}),
        joint_attention_dim=text_2.d_model,
        pooled_projection_dim=text.hidden_size,
    )
    return EditorConfig(flux, text, text_2)


class Editor(nnx.Module):
    """`dtype` is what the transformer and T5 compute in; CLIP's text tower computes in float32."""

    def __init__(self, config: EditorConfig, unroll: int, dtype: Any = jnp.float32, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        self.transformer = Flux(config.flux, unroll=unroll, rngs=rngs)
        self.text_encoder = ClipText(config.text, rngs=rngs)
        self.text_encoder_2 = T5Encoder(config.text_2, rngs=rngs)

    def prompt(self, clip_ids: jax.Array, t5_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids [b, t] -> text [b, t, j] and pooled [b, p]."""
        encoders = (self.text_encoder, self.text_encoder_2)
        return encode_text(encoders, (clip_ids, t5_ids), self.dtype)

    def velocity(
        self, tokens: jax.Array, condition: jax.Array | None, text: jax.Array, modulations: Modulations, side: int
    ) -> jax.Array:
        """Velocity [b, s, c] of noisy tokens [b, s, c] of latents side × side, given the condition's if any."""
        ids = position_ids(side, side, 0)
        if condition is not None:
            ids = jnp.concatenate([ids, position_ids(side, side, 1)])
            tokens = jnp.concatenate([tokens, condition], axis=1)
        v = self.transformer.velocity(tokens.astype(self.dtype), text, modulations, ids, text_ids(text.shape[1]))
        return v[:, : (side // 2) ** 2].astype(jnp.float32)


def part_of(modulations: Modulations, start: int, stop: int) -> Modulations:
    """The modulations of examples start … stop."""
    double, single = jax.tree.map(lambda x: x[:, start:stop], (modulations.double, modulations.single))
    return Modulations(double, single, modulations.output[start:stop])


def flow_loss(
    model: Editor,
    batch: dict[str, dict[str, jax.Array]],
    clip_ids: jax.Array | np.ndarray,
    t5_ids: jax.Array | np.ndarray,
    key: jax.Array,
    config,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, mean squared error of the velocity by form) of a batch that corpus.look_up made.

    clip_ids and t5_ids [captions, t] are the captions' tokens. `config`: loss_weight, guidance and form_weights of
    configs/base_transformer.py. All forms share one pass of the text encoders and one product for the modulations.
    """
    caption = jnp.concatenate([form["caption"] for form in batch.values()])
    text, pooled = model.prompt(jnp.asarray(clip_ids)[caption], jnp.asarray(t5_ids)[caption])
    *form_keys, guidance_key = jax.random.split(key, len(batch) + 1)
    low, high = config.guidance
    # Any guidance value means the same to this base: it is trained from data, not distilled.
    guidance = jax.random.uniform(guidance_key, caption.shape, minval=low, maxval=high)
    noised = [
        draw(form_key, pack(form["latents"].astype(jnp.float32)), train_timesteps(), train_weights(config.loss_weight))
        for form_key, form in zip(form_keys, batch.values())
    ]
    time = jnp.concatenate([form.time_b for form in noised])
    modulations = model.transformer.modulations(pooled, time, guidance)
    errors, start = {}, 0
    for (name, form), known in zip(batch.items(), noised):
        stop = start + len(form["caption"])
        condition = pack(form["condition"].astype(jnp.float32)) if "condition" in form else None
        v = model.velocity(
            known.tokens_bsc, condition, text[start:stop], part_of(modulations, start, stop), form["latents"].shape[1]
        )
        errors[name] = (jnp.square(v - known.target_bsc).mean((1, 2)) * known.weight_b).mean()
        start = stop
    total = sum(config.form_weights[name] for name in errors)
    return reduce(operator.add, [config.form_weights[name] / total * errors[name] for name in errors]), errors


def sample(
    model: Editor, noise: jax.Array, condition: jax.Array | None, clip_ids: jax.Array, t5_ids: jax.Array, steps: int
) -> jax.Array:
    """Latents [b, side, side, c] from noise of the same shape, by Euler steps; token ids [b, t]."""
    side = noise.shape[1]
    text, pooled = model.prompt(clip_ids, t5_ids)
    references = None if condition is None else pack(condition.astype(jnp.float32))

    def velocity(z, time):
        modulations = model.transformer.modulations(pooled, time, jnp.full(time.shape, 2.5))
        return model.velocity(z, references, text, modulations, side)

    sigmas = jnp.asarray(Schedule().sigmas(steps, (side // 2) ** 2))
    return unpack(euler(velocity, pack(noise), sigmas), side, side)
