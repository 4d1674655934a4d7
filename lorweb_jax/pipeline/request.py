"""What is to be sampled: texts, reference images and settings, all checked before any work."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.finite import require_finite
from lorweb_jax.images.fit import FITS, STRETCH, Placement, placement
from lorweb_jax.images.grid import fit_to_model, stretched, within
from lorweb_jax.pipeline.arguments import MAX_SIZE, Images, as_analogies, as_prompts, as_references, as_size
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import Size
from lorweb_jax.settings.rules import GUIDANCE, SAMPLING_STEPS, STRENGTH, Choice, Flag, Whole, as_value, shown
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.settings.texts import as_text


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The keyword arguments that every edit and generation takes beside its texts and images.

    steps: Euler steps, 1 to 1000.
    guidance: the model's guidance input, 0 to 100; for edits by analogy 2.5, for others 3.5 by default.
    seed: 0 to 2^64 − 1. The noise of the i-th image of a batch depends on the seed and i alone. Or one seed for each
        image, whose noise is then that of the image made alone with it.
    true_guidance: scale of classifier-free guidance against `negative_prompt` (diffusers' true_cfg_scale), 0 to 100.
        Each step then runs the transformer on two rows an image; at 1 on the prompt alone, at 0 on the negative one.
    negative_prompt: what the image should not be; empty if it isn't given.
    true_guidance_start: the step, counted from 0, from which `true_guidance` is in force; before it the prompt alone.
    strengths: of a session's styles, one each, −1000 to 1000, in the place of their own; negative ones lead away.
    style_start: the step from which the styles are in force; by default a fifth of the steps.
    published_times: space the noise levels as Pair Customization's published sampler does, which counts a 64th of the
        image's tokens.
    noise: packed latents [b, s, c] in the place of the seed's (diffusers' `latents`).
    round_to_bfloat16: round timestep and guidance as the published pipeline does in bfloat16, to compare with it.
    callback: callback(step, latents) after each step 0, 1, …, once the packed latents float32 [b, s, c] are computed.
        What it raises ends the sampling.
    preview: preview(step, images) after every `preview_every`-th step but the last: what the b results, uint8
        [H, W, 3], would be if the velocity stayed as it was in this step. Costs a decoding each time; what it raises
        ends the sampling.
    """

    steps: int = 28
    guidance: float = 2.5
    seed: int | Sequence[int] = 0
    true_guidance: float = 1.0
    negative_prompt: str | None = None
    true_guidance_start: int = 0
    strengths: Sequence[float] | None = None
    style_start: int | None = None
    published_times: bool = False
    noise: np.ndarray | None = None
    round_to_bfloat16: bool = False
    callback: Callable[[int, jax.Array], Any] | None = None
    preview: Callable[[int, list[np.ndarray]], Any] | None = None
    preview_every: int = 1

    def __post_init__(self):
        for name, rule in (
            ("steps", SAMPLING_STEPS),
            ("preview_every", SAMPLING_STEPS),
            ("guidance", GUIDANCE),
            ("true_guidance", GUIDANCE),
            ("round_to_bfloat16", Flag()),
            ("published_times", Flag()),
        ):
            object.__setattr__(self, name, as_value(getattr(self, name), name, rule))
        for seed in self.seed if isinstance(self.seed, list | tuple) else [self.seed]:
            random_key(seed)
        for name in ("true_guidance_start", "style_start"):
            self._check_start(name)
        if self.strengths is not None:
            object.__setattr__(self, "strengths", as_strengths(self.strengths))
        if self.negative_prompt is not None:
            object.__setattr__(self, "negative_prompt", as_text(self.negative_prompt, "negative_prompt"))
            if self.true_guidance == 1:
                raise UserError(
                    "negative_prompt was given and true_guidance is 1, at which it changes nothing; give a "
                    "true_guidance such as 3",
                    2,
                )
        if self.true_guidance_start and self.true_guidance == 1:
            raise UserError(
                "true_guidance_start was given and true_guidance is 1, at which it changes nothing; give a "
                "true_guidance such as 4",
                2,
            )
        for name, takes in (("callback", "step, latents"), ("preview", "step, images")):
            if (function := getattr(self, name)) is not None and not callable(function):
                raise UserError(
                    f"the {name} is a {type(function).__name__}; give a function of ({takes}), or leave it out"
                )

    def _check_start(self, name: str) -> None:
        if (start := getattr(self, name)) is None:
            return
        start = as_value(start, name, Whole(0, SAMPLING_STEPS.high))
        if start >= self.steps:
            raise UserError(
                f"{name} is {start} and there are {self.steps} steps, counted from 0, so that it would never be "
                f"reached; give at most {self.steps - 1}",
                2,
            )
        object.__setattr__(self, name, start)


def as_strengths(values: Any) -> tuple[float, ...]:
    """Strengths of styles; UserError for anything but a sequence of numbers in STRENGTH."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise UserError(f"the strengths are {shown(values)}; give a list of numbers, one for each style", 2)
    return tuple(float(as_value(value, "a style's strength", STRENGTH)) for value in values)


@dataclasses.dataclass(frozen=True)
class Request:
    """A batch of b images of one size.

    references: for each reference image of a row uint8 [b, H, W, 3], sides multiples of 16; none for text to image.
    noise: float32 [b, s, c], of the sampling's own or of its seed.
    places: of an edit, how each b came into its quadrant; results go back that way.
    """

    prompts: list[str]
    references: list[np.ndarray]
    size: Size
    noise: np.ndarray
    sampling: Sampling
    places: list[Placement] = dataclasses.field(default_factory=list)


def as_sampling(options: Mapping[str, Any]) -> Sampling:
    """UserError for an option that there isn't, with those that there are."""
    known = [field.name for field in dataclasses.fields(Sampling)]
    if unknown := [name for name in options if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1) or [", ".join(known)]
        raise UserError(f"there is no option {unknown[0]} for sampling; near it: {near[0]}", 2)
    return Sampling(**options)


def edit_request(
    folder: PipelineFolder,
    conditions: Any,
    prompts: Any,
    sampling: Mapping[str, Any],
    max_size: int | None = None,
    fit: str = STRETCH,
) -> tuple[list[Images], Request]:
    """The analogies (a, a′, b) as uint8 images, and the request that shows them as references, such as FLUX.1's grid.

    fit: how a b of other proportions than a's comes into its quadrant, and the result back (images/fit.py). Says what
    is resized or stretched. Raises UserError for arguments of another kind or range, and for analogies whose grids
    differ in size.
    """
    sampling = as_sampling(sampling)
    max_size = _max_size(max_size)
    conditions = as_analogies(conditions)
    prompts = as_prompts(prompts, len(conditions))
    fit = as_value(fit, "fit", Choice(FITS))
    places = [placement(b, a.shape[1::-1], fit) for a, _, b in conditions]
    fitting = [(a, a2, each.shown) for (a, a2, _), each in zip(conditions, places)]
    shown = [folder.backbone.references.images(*images, max_size) for images in fitting]
    references = [_fitted(column, "grid") for column in zip(*shown)]
    for sentence in stretched(fitting):
        say(sentence)
    for column in references:
        _require_one_size(
            column, "the analogies give grids of", "edit them one by one, or resize the first images alike"
        )
    size = references[0][0].shape[:2]
    noise = _noise(folder, sampling, len(conditions), size)
    return conditions, Request(prompts, [np.stack(column) for column in references], size, noise, sampling, places)


def generation_request(
    folder: PipelineFolder,
    prompts: Any,
    images: Any,
    sampling: Mapping[str, Any],
    size: Any = None,
    max_size: int | None = None,
) -> Request:
    """Text to image, or with a reference image or several for each prompt.

    images: for each prompt an image or a sequence of them, as many and of the same sizes for all; None for none.
    size: (width, height) of the result; by default that of the first reference, or the autoencoder's own. Raises
    UserError as `edit_request` does.
    """
    sampling = as_sampling({"guidance": 3.5} | dict(sampling))
    max_size = _max_size(max_size)
    prompts = as_prompts(prompts)
    if not prompts:
        raise UserError("there are no prompts; give one for each image to make", 2)
    rows = as_references(images, len(prompts))
    references = []
    for place, column in enumerate(zip(*rows)):
        fitted = _fitted([within(image, max_size) for image in column], "image")
        _require_one_size(
            fitted,
            f"the reference images{f' number {place}' * (len(rows[0]) > 1)} have",
            "give them one by one, or resize them alike",
        )
        references.append(np.stack(fitted))
    if size is not None:
        size = as_size(size)
    elif references:
        size = references[0].shape[1:3]
    else:
        trained = folder.vae_config.sample_size
        side = max(16, min(trained, max_size or trained) // 16 * 16)
        size = side, side
    return Request(prompts, references, size, _noise(folder, sampling, len(prompts), size), sampling)


def _max_size(max_size: Any) -> int | None:
    return None if max_size is None else as_value(max_size, "max_size", MAX_SIZE)


def _fitted(images: Sequence[np.ndarray], name: str) -> list[np.ndarray]:
    """The images with sides that are multiples of 16; says so of the first that is resized."""
    fitted = [fit_to_model(image, name=name) for image in images]
    if note := next((note for _, note in fitted if note), None):
        say(note)
    return [image for image, _ in fitted]


def _require_one_size(images: Sequence[np.ndarray], what: str, remedy: str) -> None:
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        named = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise UserError(f"{what} different sizes, {named}; {remedy}")


def _noise(folder: PipelineFolder, sampling: Sampling, batch: int, size: Size) -> np.ndarray:
    """Packed latents [b, s, c] for images of `size` in pixels; UserError where `sampling.noise` is anything else."""
    vae, patch = folder.vae_config, folder.backbone.latents.patch
    shape = (batch, size[0] * size[1] // (patch * vae.downscale) ** 2, patch**2 * vae.latent_channels)
    if sampling.noise is None:
        if isinstance(sampling.seed, list | tuple):
            if len(sampling.seed) != batch:
                raise UserError(
                    f"{len(sampling.seed)} seeds were given for {batch} images; give one, or one for each", 2
                )
            keys = [jax.random.fold_in(random_key(seed), 0) for seed in sampling.seed]
        else:
            keys = [jax.random.fold_in(random_key(sampling.seed), i) for i in range(batch)]
        return np.stack([jax.random.normal(key, shape[1:]) for key in keys])
    try:
        noise = np.asarray(sampling.noise)
        description = f"{list(noise.shape)} of {noise.dtype}"
    except ValueError as error:  # rows of unequal length
        raise UserError(f"the noise is no array ({error}); give numbers {list(shape)}, or leave it out") from None
    if noise.shape != shape or noise.dtype.kind not in "fiu":
        raise UserError(
            f"the noise is {description}, numbers {list(shape)} were expected; give packed latents [b, s, c], or leave "
            "it out"
        )
    require_finite(noise, "the noise", "give finite numbers")
    return noise.astype(np.float32)
