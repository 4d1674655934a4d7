"""e2e_*.npz: one whole edit, each stage computed from that stage's recorded input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import TRAIN_STEPS
from lorweb_jax.images.grid import bottom_right, condition_grid
from lorweb_jax.images.levels import to_uint8
from lorweb_jax.models.flux1.packing import position_ids, text_ids
from lorweb_jax.models.tokenizers.folder import tokenize_clip, tokenize_t5
from parity.folder import Bases, RecordedModels, Recording
from parity.images import deviation
from parity.report import COEFFICIENT, EXACT, LEVEL, OUTPUT, Absent, Comparison
from parity.training import latents, tokens
from parity.transformer import Inputs, adapters_of, velocity


def check_edit(report: Comparison, name: str, data: Recording, bases: Bases, models: RecordedModels) -> None:
    def compare(key, ours, tolerance, *needed):
        if key in data and all(part in data for part in needed):
            report.compare(f"{name} {key}", ours, data[key], tolerance)

    _check_images(report, name, data, models, compare)
    _check_text(data, models, compare)
    _check_query(report, name, data, bases, models, compare)
    _check_sampling(data, bases, models, compare)
    _check_decoding(data, models, compare)


def _check_images(report, name, data, models, compare):
    images = ("image_a", "image_atag", "image_b")

    def grid():
        # The recording doesn't say whether a largest size was given: its grid's long edge tells.
        limit = max(data["grid"].shape[:2])
        return condition_grid(*(data[key] for key in images), limit)

    compare("grid", grid, EXACT, *images)
    pixels = data.get("preprocessed_control_image")
    if pixels is None:
        return
    if "grid" in data and pixels.shape[2:] != data["grid"].shape[:2]:
        report.deviates(
            f"{name} preprocessed_control_image", "the condition keeps the grid's size, cut down to multiples of 16"
        )
    else:
        compare(
            "preprocessed_control_image",
            lambda: data["grid"].transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1,
            OUTPUT,
            "grid",
        )
    compare("image_latents_packed", lambda: tokens(_encode(models.vae, pixels)), OUTPUT)


def _check_query(report, name, data, bases, models, compare):
    if "external_query" not in data or "grid" not in data:
        return
    try:
        mode = bases.default().config.query_mode
    except Absent as absent:
        report.skip(f"{name} external_query", str(absent))
        return
    if why := deviation(mode, data["grid"].shape[0] == data["grid"].shape[1]):
        report.deviates(f"{name} external_query", why)
        return
    compare(
        "external_query",
        lambda: models.image_encoder.query(mode, [data["grid"]]).reshape(data["external_query"].shape),
        OUTPUT,
    )


def _check_text(data, models, compare):
    prompt = [str(data.get("prompt"))]
    compare(
        "clip_input_ids",
        lambda: tokenize_clip(prompt, models.part("tokenizer"), data["clip_input_ids"].shape[-1]).reshape(
            data["clip_input_ids"].shape
        ),
        EXACT,
        "prompt",
    )
    compare(
        "t5_input_ids",
        lambda: tokenize_t5(prompt, models.part("tokenizer_2"), data["t5_input_ids"].shape[-1]).reshape(
            data["t5_input_ids"].shape
        ),
        EXACT,
        "prompt",
    )
    compare(
        "pooled_prompt_embeds",
        lambda: _apply(models.text_encoder, np.atleast_2d(data["clip_input_ids"])),
        OUTPUT,
        "clip_input_ids",
    )
    compare(
        "prompt_embeds",
        lambda: _apply(models.text_encoder_2, np.atleast_2d(data["t5_input_ids"])),
        OUTPUT,
        "t5_input_ids",
    )
    if "txt_ids" in data:
        compare("txt_ids", lambda: text_ids(len(data["txt_ids"])), EXACT)


def _check_sampling(data, bases, models, compare):
    noise, condition, sigmas = (data.get(key) for key in ("latents_packed", "image_latents_packed", "sigmas"))
    if sigmas is not None and noise is not None:
        ours = functools.partial(models.schedule.sigmas, len(sigmas) - 1, noise.shape[1])
        compare("sigmas", ours, COEFFICIENT)
        compare("timesteps", lambda: ours()[:-1] * np.float32(TRAIN_STEPS), COEFFICIENT)
    for key, image, packed in (("latent_ids", 0, noise), ("image_ids", 1, condition)):
        size = _latent_size(data, image, packed)
        if size:
            compare(key, functools.partial(position_ids, *size, image), EXACT)
    compare(
        "img_ids", lambda: np.concatenate([data["latent_ids"], data["image_ids"]]), EXACT, "latent_ids", "image_ids"
    )
    if noise is None or condition is None:
        return
    compare("t0/hidden_states", lambda: np.concatenate([noise, condition], axis=1), EXACT)
    guidance = data.get("t0/guidance", data.get("guidance_scale"))

    for step in range(sum(re.fullmatch(r"step\d+/transformer_out", key) is not None for key in data)):
        before = noise if step == 0 else data.get(f"step{step - 1}/latents_after")
        if before is None:
            continue

        def out(step=step, before=before):
            time = np.asarray(data[f"step{step}/timestep_in"], np.float32)
            inputs = Inputs(
                np.concatenate([before, condition], axis=1),
                data["prompt_embeds"],
                data["pooled_prompt_embeds"],
                time,
                np.broadcast_to(guidance, time.shape),
                data["img_ids"],
                data["txt_ids"],
            )
            return velocity(models.transformer, inputs, adapters_of(bases.default().basis, data.get("external_query")))

        def after(step=step, before=before):
            found = data[f"step{step}/transformer_out"][:, : before.shape[1]]
            return euler(lambda z, sigma: found, before, sigmas[step : step + 2])

        compare(
            f"step{step}/transformer_out",
            out,
            OUTPUT,
            f"step{step}/timestep_in",
            "prompt_embeds",
            "pooled_prompt_embeds",
            "img_ids",
            "txt_ids",
        )
        compare(f"step{step}/latents_after", after, OUTPUT, "sigmas", f"step{step}/transformer_out")
        compare(f"step{step}/t", lambda step=step: sigmas[step] * np.float32(TRAIN_STEPS), COEFFICIENT, "sigmas")
        compare(f"step{step}/timestep_in", lambda step=step: sigmas[step : step + 1], COEFFICIENT, "sigmas")


def _latent_size(data, image, packed):
    """(height, width) of the latents that the packed noise (image 0) or condition (1) came from, if recorded."""
    if image == 0 and "vae_decode_in" in data:
        return data["vae_decode_in"].shape[2:]
    pixels = data.get("preprocessed_control_image")
    if pixels is None or packed is None:
        return None
    scale = round((pixels.shape[2] * pixels.shape[3] / (4 * packed.shape[1])) ** 0.5)
    return pixels.shape[2] // scale, pixels.shape[3] // scale


def _check_decoding(data, models, compare):
    if "vae_decode_in" in data:
        height, width = data["vae_decode_in"].shape[2:]

        def unscaled():
            config = models.vae.config
            return latents(data["final_latents_packed"], height, width) / config.scaling_factor + config.shift_factor

        compare("vae_decode_in", unscaled, OUTPUT, "final_latents_packed")
    compare("vae_decode_out", lambda: _decode(models.vae, data["vae_decode_in"]), OUTPUT, "vae_decode_in")
    compare(
        "image_out",
        lambda: to_uint8(jnp.asarray(data["vae_decode_out"][0]).transpose(1, 2, 0)),
        LEVEL,
        "vae_decode_out",
    )
    compare("image_out_cropped", lambda: bottom_right(data["image_out"]), EXACT, "image_out")


@jax.jit
def _apply(model, ids):
    return model(ids)


@jax.jit
def _encode(vae, pixels_bchw):
    return vae.latents(pixels_bchw.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@jax.jit
def _decode(vae, latents_bchw):
    return vae.decode(latents_bchw.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
