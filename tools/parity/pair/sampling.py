"""schedule.npz, sample_*.npz and e2e_style.npz: times, and the published sampler's steps with style guidance."""

import functools
import re

import jax.numpy as jnp
import numpy as np

from lorweb_jax.flow.guidance import StyleGuidance
from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import pair_times, published_tokens
from lorweb_jax.models.flux1.packing import position_ids, text_ids
from lorweb_jax.models.tokenizers.folder import tokenize_clip, tokenize_t5
from parity.folder import RecordedModels, Recording
from parity.pair.adapters import Adapters, weighted
from parity.report import COEFFICIENT, EXACT, OUTPUT, Comparison
from parity.training import latents, tokens
from parity.transformer import Inputs, velocity


def check_schedule(report: Comparison, name: str, data: Recording, models: RecordedModels) -> None:
    for key, theirs in data.items():
        line = f"{name} {key}"
        if match := re.fullmatch(r"sample/n(\d+)_(\d+)x(\d+)/(seq_len_used|mu|timesteps)", key):
            steps, height, width = (int(number) for number in match.groups()[:3])
            counted = published_tokens(height, width)
            ours = {
                "seq_len_used": lambda counted=counted: counted,
                "mu": functools.partial(models.schedule.shift, counted),
                "timesteps": functools.partial(models.schedule.sigmas, steps, counted),
            }
            report.compare(line, ours[match[4]], theirs, EXACT if match[4] == "seq_len_used" else COEFFICIENT)
        elif key == "train/timesteps":
            report.compare(line, pair_times, theirs, COEFFICIENT)


def check_sample(
    report: Comparison, name: str, data: Recording, adapters: Adapters, models: RecordedModels, styles: list[str]
) -> None:
    """Each velocity and each step from the recorded latents before it, and the end from the recorded start."""
    steps = sum(re.fullmatch(r"step\d+/latents", key) is not None for key in data)
    passes = ["content", "negative", *(f"style{index}" for index in range(len(styles)))]
    batch, count = data["step0/latents"].shape[:2]
    ids = data["img_ids"] if "img_ids" in data else position_ids(data["height"] // 8, data["width"] // 8, 0)

    @functools.cache
    def text_of(which: str) -> tuple:
        """Recorded, or (in e2e_style.npz) computed from the recorded ids."""
        embeddings = data.get(f"{which}/encoder_hidden_states")
        if embeddings is None:
            embeddings = models.text_encoder_2(jnp.asarray(data[f"{which}/t5_ids"]))
        return embeddings, data[f"{which}/pooled_projections"]

    def of_pass(which: str, z: np.ndarray, time: float) -> np.ndarray:
        text, pooled = text_of(which)
        basis = adapters.basis([f"style_{case}" for case in styles])
        weights = [float(which == f"style{index}") for index in range(len(styles))]
        level, guidance = (np.full(batch, value, np.float32) for value in (time, data["guidance"]))
        inputs = Inputs(z, text, pooled, level, guidance, ids, text_ids(text.shape[1]))
        return velocity(models.transformer, inputs, weighted(basis, weights, batch))

    def combined(step: int, velocities: list) -> np.ndarray:
        """The velocity of a step: before cfg_start the negative prompt's is the content's."""
        content, negative, *of_styles = velocities
        guidance = StyleGuidance.of(float(data["cfg"]), data["style_scales"][: len(of_styles)])
        negative = negative if step >= data["cfg_start"] else content
        return guidance(jnp.stack([content, negative, *of_styles]))

    def run(step: int) -> list[str]:
        return [which for which in passes if not which.startswith("style") or step >= data["style_start"]]

    def following(step: int) -> np.ndarray:
        velocities = [data[f"step{step}/v_{which}"] for which in run(step)]
        levels = data["timesteps"][step : step + 2]
        return euler(lambda z, _: combined(step, velocities), data[f"step{step}/latents"], levels)

    def last() -> np.ndarray:
        z = data["step0/latents"]
        for step in range(steps):
            velocities = [of_pass(which, z, data["timesteps"][step]) for which in run(step)]
            z = euler(lambda z, _, v=velocities, k=step: combined(k, v), z, data["timesteps"][step : step + 2])
        return z

    def packed_end() -> np.ndarray:
        return data["final"] if "final" in data else tokens(data["final_latents"])

    for step in range(steps):
        for which in passes:
            key = f"step{step}/v_{which}"
            if key in data:
                ours = functools.partial(of_pass, which, data[f"step{step}/latents"], data["timesteps"][step])
                report.compare(f"{name} {key}", ours, data[key], OUTPUT)
        after = data[f"step{step + 1}/latents"] if step + 1 < steps else packed_end()
        report.compare(f"{name} step{step}, the latents after it", functools.partial(following, step), after, OUTPUT)
    report.compare(f"{name} all {steps} steps from the recorded noise", last, packed_end(), OUTPUT)
    if count != len(ids):
        report.fail(f"{name} img_ids", f"{len(ids)} ids for {count} tokens")


def check_end_to_end(report: Comparison, name: str, data: Recording, models: RecordedModels) -> None:
    """From strings to ids and embeddings, from noise to packed latents and pixels."""
    texts = {"content": data["prompt"], "negative": data["negative_prompt"], "style0": data["style_prompt"]}
    report.compare(
        f"{name} style_prompt",
        lambda: np.frombuffer(f"{data['prompt']} {data['style_words']}".encode(), np.uint8),
        np.frombuffer(str(data["style_prompt"]).encode(), np.uint8),
        EXACT,
    )
    for which, text in texts.items():
        text = [str(text)]

        def clip_ids(text=text, count=data[f"{which}/clip_ids"].shape[1]):
            return tokenize_clip(text, models.part("tokenizer"), count)

        def t5_ids(text=text, count=data[f"{which}/t5_ids"].shape[1]):
            return tokenize_t5(text, models.part("tokenizer_2"), count)

        report.compare(f"{name} {which}/clip_ids", clip_ids, data[f"{which}/clip_ids"], EXACT)
        report.compare(f"{name} {which}/t5_ids", t5_ids, data[f"{which}/t5_ids"], EXACT)
        report.compare(
            f"{name} {which}/pooled_projections",
            lambda which=which: models.text_encoder(jnp.asarray(data[f"{which}/clip_ids"])),
            data[f"{which}/pooled_projections"],
            OUTPUT,
        )
        if f"{which}/encoder_hidden_states" in data:
            report.compare(
                f"{name} {which}/encoder_hidden_states",
                lambda which=which: models.text_encoder_2(jnp.asarray(data[f"{which}/t5_ids"])),
                data[f"{which}/encoder_hidden_states"],
                OUTPUT,
            )
    height, width = int(data["height"]), int(data["width"])
    report.compare(
        f"{name} timesteps",
        lambda: models.schedule.sigmas(len(data["timesteps"]) - 1, published_tokens(height, width)),
        data["timesteps"],
        COEFFICIENT,
    )
    report.compare(f"{name} noise, packed", lambda: tokens(data["noise"]), data["step0/latents"], EXACT)
    report.compare(
        f"{name} decoded",
        lambda: models.vae.image(jnp.asarray(data["final_latents"]).transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        data["decoded"],
        OUTPUT,
    )
    report.compare(
        f"{name} final_latents, packed and back",
        lambda: latents(tokens(data["final_latents"]), height // 8, width // 8),
        data["final_latents"],
        EXACT,
    )
