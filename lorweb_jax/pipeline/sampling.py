"""From a request to images: the jitted parts of a pipeline, run one after the other."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.flow.sampling import Combine
from lorweb_jax.flow.schedule import Schedule
from lorweb_jax.images.levels import to_uint8
from lorweb_jax.models.image_encoder.encoder import ImageEncoder
from lorweb_jax.nn.layers import Adapter
from lorweb_jax.pipeline.model import AnalogyModel, Size
from lorweb_jax.pipeline.request import Request

Text = tuple[jax.Array, jax.Array]  # text [b, t, j], pooled [b, p]


class Embeddings(Protocol):
    """What text and image encoders would say, from elsewhere (precomputed.read.Precomputed: from disk)."""

    image_encoder: ImageEncoder | None

    def prompt(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Instructions -> text [b, t, j] and pooled [b, p]."""

    def query(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """Condition grids uint8 [H, W, 3] -> external queries [b, q]."""


def make_images(
    model: AnalogyModel,
    schedule: Schedule,
    request: Request,
    text: Text,
    combine: Combine,
    adapters: dict[str, Adapter] | None,
) -> np.ndarray:
    """uint8 [b, H, W, 3] of a request, whose `passes` gave `combine` and the texts.

    adapters: for all rows of all passes, or None. Raises UserError where the result is not finite, with the place.
    """
    model, references, reference_sizes = model.only("transformer", "vae"), None, None
    if request.references:
        encoded = [_encode(model.only("vae"), jnp.asarray(image)) for image in request.references]
        references = jnp.concatenate(encoded, axis=1)
        reference_sizes = tuple(image.shape[1:3] for image in request.references)
    tokens = _denoise(model, schedule, request, text, combine, adapters, references, reference_sizes)
    decoded = _decode(model.only("vae"), request.size, tokens)
    places = {"the text's embedding": text[0], "the text's pooled embedding": text[1]}
    if references is not None:
        places["the latents of the images given"] = references
    _require_finite(places | {"the latents after sampling": tokens, "the decoded image": decoded})
    return to_uint8(decoded)


def _denoise(model, schedule, request, text, combine, adapters, references, reference_sizes) -> jax.Array:
    """Packed latents [b, s, c] after all steps: one program, or one a step where there is a callback."""
    sampling, noise = request.sampling, jnp.asarray(request.noise)
    sigmas, guidance = schedule.sigmas(sampling.steps, noise.shape[1]), jnp.float32(sampling.guidance)
    shape = (request.size, reference_sizes, sampling.round_to_bfloat16)
    if sampling.callback is None:
        return _sample(model, shape, noise, references, text, guidance, jnp.asarray(sigmas), combine, adapters)
    modulations = _modulations(model, shape, text, guidance, jnp.asarray(sigmas), adapters)
    z = noise
    for step, difference in enumerate(np.diff(sigmas)):
        z = _step(model, shape, step, z, difference, modulations, references, text, combine, adapters)
        sampling.callback(step, jax.block_until_ready(z))
    return z


def encode_prompt(model: AnalogyModel, clip_ids: np.ndarray, t5_ids: np.ndarray) -> Text:
    """AnalogyModel.prompt, jitted."""
    return _prompt(model.only("text_encoder", "text_encoder_2"), jnp.asarray(clip_ids), jnp.asarray(t5_ids))


def encode_query(model: AnalogyModel, views: np.ndarray) -> jax.Array:
    """AnalogyModel.query, jitted."""
    return _query(model, jnp.asarray(views))


@nnx.jit
def _prompt(model: AnalogyModel, clip_ids, t5_ids) -> Text:
    return model.prompt(clip_ids, t5_ids)


@nnx.jit
def _query(model: AnalogyModel, views) -> jax.Array:
    return model.query(views)


@nnx.jit
def _encode(model: AnalogyModel, images) -> jax.Array:
    return model.tokens(images)


Shape = tuple[Size, tuple[Size, ...] | None, bool]  # the result's, the references', whether times are rounded


@functools.partial(nnx.jit, static_argnums=1)
def _sample(model: AnalogyModel, shape: Shape, noise, references, text, guidance, sigmas, combine, adapters):
    size, reference_sizes, rounded = shape
    return model.sample(
        noise,
        references,
        *text,
        guidance,
        sigmas,
        size,
        adapters,
        combine=combine,
        reference_sizes=reference_sizes,
        round_to_bfloat16=rounded,
    )


@functools.partial(nnx.jit, static_argnums=1)
def _modulations(model: AnalogyModel, shape: Shape, text, guidance, sigmas, adapters) -> Any:
    return model.step_modulations(sigmas, text[1], guidance, adapters, shape[2])


@functools.partial(nnx.jit, static_argnums=1)
def _step(model: AnalogyModel, shape: Shape, step, z, difference, modulations, references, text, combine, adapters):
    size, reference_sizes, _ = shape
    now = jax.tree.map(lambda x: x[step], modulations)
    return model.step(
        z, difference, now, references, text[0], size, adapters, combine=combine, reference_sizes=reference_sizes
    )


@functools.partial(nnx.jit, static_argnums=1)
def _decode(model: AnalogyModel, size: Size, tokens) -> jax.Array:
    return model.images(tokens, *size)


@jax.jit
def not_finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{name: whether the array holds not-a-number or infinity}."""
    return {name: ~jnp.isfinite(array).all() for name, array in arrays.items()}


def _require_finite(places: dict[str, jax.Array]) -> None:
    """UserError that names the first of the places, in the order of computation, whose numbers are not all finite."""
    bad = jax.device_get(not_finite(places))
    for place in places:
        if bad[place]:
            raise UserError(
                f"there is no result: {place} holds not-a-number or infinity; check the weights of the "
                "pipeline and the basis, give smaller coefficients, or compute in float32"
            )
