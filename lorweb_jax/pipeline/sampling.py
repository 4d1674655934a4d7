"""From a request to images: the jitted parts of a pipeline, run one after the other."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.flow.schedule import Schedule, published_tokens
from lorweb_jax.images.levels import to_uint8
from lorweb_jax.models.image_encoder.encoder import ImageEncoder
from lorweb_jax.nn.layers import Adapter
from lorweb_jax.pipeline import devices
from lorweb_jax.pipeline.model import AnalogyModel, Size
from lorweb_jax.pipeline.request import Request
from lorweb_jax.pipeline.stages import Stage

Text = tuple[jax.Array, jax.Array]  # text [b, t, j], pooled [b, p]


class Embeddings(Protocol):
    """What text and image encoders would say, from elsewhere (precomputed.read.Precomputed: from disk)."""

    image_encoder: ImageEncoder | None

    def prompt(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Instructions -> text [b, t, j] and pooled [b, p]."""

    def query(self, grids: Sequence[np.ndarray]) -> np.ndarray:
        """Condition grids uint8 [H, W, 3] -> external queries [b, q]."""


class Rows(NamedTuple):
    """What the rows of a stage's batch have: texts, and what is beside the weights (None: nothing), of all passes."""

    stage: Stage
    text: Text
    adapters: dict[str, Adapter] | None


def make_images(
    model: AnalogyModel, schedule: Schedule, request: Request, text: Text, stages: Sequence[Rows]
) -> np.ndarray:
    """uint8 [b, H, W, 3] of a request, by its stages in order.

    text: all texts that these have. Raises UserError where the result is not finite, with the place.
    """
    model, references, reference_sizes = model.only("transformer", "vae"), None, None
    if request.references:
        encoded = [_encode(model.only("vae"), jnp.asarray(image)) for image in request.references]
        references = jnp.concatenate(encoded, axis=1)
        reference_sizes = tuple(image.shape[1:3] for image in request.references)
    shown = request.noise.shape[1] + (0 if references is None else references.shape[1])
    rows = max(len(rows.text[0]) for rows in stages)
    devices.tell_undivided(devices.mesh_of(model), rows, shown, text[0].shape[1])
    tokens = _denoise(model, schedule, request, stages, references, reference_sizes)
    decoded = _decode(model.only("vae"), request.size, tokens)
    places = {"the text's embedding": text[0], "the text's pooled embedding": text[1]}
    if references is not None:
        places["the latents of the images given"] = references
    _require_finite(places | {"the latents after sampling": tokens, "the decoded image": decoded})
    return to_uint8(decoded)


def _denoise(model, schedule, request, stages, references, reference_sizes) -> jax.Array:
    """Packed latents [b, s, c] after all steps: one program a stage, or one a step where somebody is told of them."""
    sampling, z = request.sampling, jnp.asarray(request.noise)
    tokens = published_tokens(*request.size) if sampling.published_times else z.shape[1]
    sigmas, guidance = schedule.sigmas(sampling.steps, tokens), jnp.float32(sampling.guidance)
    shape = (request.size, reference_sizes, sampling.round_to_bfloat16)
    for stage, text, adapters in stages:
        levels, combine = sigmas[stage.first : stage.end + 1], stage.combine
        if sampling.callback is None and sampling.preview is None:
            z = _sample(model, shape, z, references, text, guidance, jnp.asarray(levels), combine, adapters)
            continue
        modulations = _modulations(model, shape, text, guidance, jnp.asarray(levels), adapters)
        for step, difference in enumerate(np.diff(levels)):
            before = z
            z = _step(model, shape, step, z, difference, modulations, references, text, combine, adapters)
            number = stage.first + step
            if sampling.callback:
                sampling.callback(number, jax.block_until_ready(z))
            if sampling.preview and (number + 1) % sampling.preview_every == 0 and number + 1 < sampling.steps:
                clean = z - levels[step + 1] * (z - before) / difference  # z − σ'·v, where v led from σ to σ'
                sampling.preview(number, list(to_uint8(_decode(model.only("vae"), request.size, clean))))
    return z


def encode_prompt(model: AnalogyModel, clip_ids: np.ndarray, t5_ids: np.ndarray) -> Text:
    """AnalogyModel.prompt, jitted."""
    return _prompt(model.only("text_encoder", "text_encoder_2"), jnp.asarray(clip_ids), jnp.asarray(t5_ids))


def encode_query(model: AnalogyModel, views: np.ndarray) -> jax.Array:
    """AnalogyModel.query, jitted."""
    return _query(model, jnp.asarray(views))


@devices.jit
def _prompt(model: AnalogyModel, clip_ids, t5_ids) -> Text:
    return model.prompt(clip_ids, t5_ids)


@devices.jit
def _query(model: AnalogyModel, views) -> jax.Array:
    return model.query(views)


@devices.jit
def _encode(model: AnalogyModel, images) -> jax.Array:
    return model.tokens(images)


Shape = tuple[Size, tuple[Size, ...] | None, bool]  # the result's, the references', whether times are rounded


@devices.jit(static_argnums=1)
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


@devices.jit(static_argnums=1)
def _modulations(model: AnalogyModel, shape: Shape, text, guidance, sigmas, adapters) -> Any:
    return model.step_modulations(sigmas, text[1], guidance, adapters, shape[2])


@devices.jit(static_argnums=1)
def _step(model: AnalogyModel, shape: Shape, step, z, difference, modulations, references, text, combine, adapters):
    size, reference_sizes, _ = shape
    now = jax.tree.map(lambda x: x[step], modulations)
    return model.step(
        z, difference, now, references, text[0], size, adapters, combine=combine, reference_sizes=reference_sizes
    )


@devices.jit(static_argnums=1)
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
