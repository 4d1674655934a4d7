"""schedule.npz, sample_*.npz and e2e_style.npz: times, and the published sampler's steps with style guidance."""

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.flow.sampling import euler_step
from lorweb_jax.flow.schedule import pair_times, published_tokens
from lorweb_jax.models.tokenizers.folder import tokenize_clip, tokenize_t5
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.pipeline.request import Sampling
from lorweb_jax.pipeline.stages import NEGATIVE, PROMPT, Stage, stages
from lorweb_jax.pipeline.styles import Style, Styles
from parity.folder import RecordedModels, Recording
from parity.pair.adapters import Adapters
from parity.report import COEFFICIENT, EXACT, OUTPUT, Absent, Comparison
from parity.training import latents, tokens


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


class RecordedTexts:
    """The recorded embeddings of each pass, in the place of the text encoders: a text's last word names its pass."""

    image_encoder = None

    def __init__(self, text_of):
        self.text_of = text_of

    def prompt(self, texts):
        parts = [self.text_of(text.rpartition(" ")[2]) for text in texts]
        return tuple(np.concatenate([np.asarray(part) for part in side]) for side in zip(*parts))


class Sampler:
    """A recorded sampling by the package's own session: its options, passes and styles."""

    def __init__(self, data: Recording, adapters: Adapters, models: RecordedModels, cases: list[str]):
        self.data, self.models = data, models
        self.styles = [Style(adapters[f"style_{case}"], f"style_{case}") for case in cases]
        ids = data["img_ids"] if "img_ids" in data else None
        self.size = (
            (int(data["height"]), int(data["width"]))
            if ids is None
            else tuple((ids[:, 1:].max(axis=0).astype(int) + 1) * 16)
        )
        self.steps = len(data["timesteps"]) - 1
        # A start that no step reaches is no option of the package: what begins there is left out.
        cfg_start, style_start = int(data["cfg_start"]), int(data["style_start"])
        guided, styled = cfg_start < self.steps, style_start < self.steps
        self.strengths = [float(scale) * styled for scale in data["style_scales"]]
        cfg = float(data["cfg"]) if guided else 1.0
        published = models.schedule.sigmas(self.steps, published_tokens(*self.size))
        self.options = dict(
            steps=self.steps,
            guidance=float(data["guidance"]),
            true_guidance=cfg,
            true_guidance_start=cfg_start if guided and cfg != 1 else 0,
            style_start=style_start if styled else None,
            strengths=self.strengths,
            published_times=bool(np.allclose(published, data["timesteps"], atol=1e-5)),
        )

    @functools.cached_property
    def stages(self) -> list[Stage]:
        return stages(Sampling(**self.options), self.strengths)

    def stage(self, step: int) -> Stage:
        return next(stage for stage in self.stages if stage.first <= step < stage.end)

    @functools.cached_property
    def model(self) -> AnalogyModel:
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "image_encoder", "basis", "processor"))
        backbone = self.models.transformer.backbone
        return AnalogyModel(backbone=backbone, transformer=self.models.transformer, vae=self.models.vae, **parts)

    def pipeline(self, texts: RecordedTexts | None) -> Pipeline:
        """With the recorded embeddings, or with the folder's own tokenizers and text encoders."""
        try:
            folder = PipelineFolder(self.models.part("transformer").parent)
        except UserError as error:
            raise Absent(str(error)) from None
        own = {} if texts else {part: getattr(self.models, part) for part in ("text_encoder", "text_encoder_2")}
        return Pipeline(folder, self.model.replace(**own), texts)

    def velocities(self, z: np.ndarray, time: float, passes: list, texts: list[tuple]) -> list[np.ndarray]:
        """Of each pass, all of them rows of one batch, from the same z at one time."""
        batch = len(z)
        text, pooled = (jnp.concatenate([jnp.asarray(part) for part in side]) for side in zip(*texts))
        level, guidance = (
            jnp.full(len(passes) * batch, value, jnp.float32) for value in (time, self.options["guidance"])
        )
        rows = jnp.tile(jnp.asarray(z), (len(passes), 1, 1))
        adapters = Styles(self.styles, self.models.layers).adapters(passes, batch)
        velocity = _velocity(self.model, rows, text, pooled, level, guidance, adapters, self.size)
        return np.split(np.asarray(velocity), len(passes))


@functools.partial(nnx.jit, static_argnums=7)
def _velocity(model, rows, text, pooled, level, guidance, adapters, size):
    return model.velocity(rows, None, text, pooled, level, guidance, size, adapters)


def check_sample(
    report: Comparison, name: str, data: Recording, adapters: Adapters, models: RecordedModels, styles: list[str]
) -> None:
    """Each velocity and each step from the recorded latents before it, and all steps from the recorded start as a
    session of the public interface makes them; from the recorded strings where there are some."""
    steps = sum(re.fullmatch(r"step\d+/latents", key) is not None for key in data)
    names = {"content": PROMPT, "negative": NEGATIVE, **{f"style{index}": index for index in range(len(styles))}}
    sampler = functools.cache(lambda: Sampler(data, adapters, models, styles))

    @functools.cache
    def text_of(which: str) -> tuple:
        """Recorded, or (in e2e_style.npz) computed from the recorded ids."""
        embeddings = data.get(f"{which}/encoder_hidden_states")
        if embeddings is None:
            embeddings = models.text_encoder_2(jnp.asarray(data[f"{which}/t5_ids"]))
        return embeddings, data[f"{which}/pooled_projections"]

    def recorded(step: int) -> list[str]:
        return [which for which in names if f"step{step}/v_{which}" in data]

    @functools.cache
    def velocities(step: int) -> dict[str, np.ndarray]:
        which, z, time = recorded(step), data[f"step{step}/latents"], data["timesteps"][step]
        passes, texts = [names[each] for each in which], [text_of(each) for each in which]
        return dict(zip(which, sampler().velocities(z, time, passes, texts)))

    def following(step: int) -> np.ndarray:
        """One Euler step from the recorded latents by the recorded velocities, combined as its stage says."""
        stage, by_pass = sampler().stage(step), {shown: which for which, shown in names.items()}
        rows = jnp.concatenate([data[f"step{step}/v_{by_pass[shown]}"] for shown in stage.passes])
        z, difference = jnp.asarray(data[f"step{step}/latents"]), np.diff(data["timesteps"][step : step + 2])[0]
        return euler_step(lambda *_: rows, z, difference, None, stage.combine)

    @functools.cache
    def run() -> list[np.ndarray]:
        """The latents after each step of a session."""
        prompt, negative, words = "content", "negative", [f"style{index}" for index in range(len(styles))]
        if strings := "prompt" in data:
            prompt, negative, words = (str(data[key]) for key in ("prompt", "negative_prompt", "style_words"))
        pipeline = sampler().pipeline(None if strings else RecordedTexts(text_of))
        of = [words] * len(styles) if strings else words
        own = [dataclasses.replace(style, words=text) for style, text in zip(sampler().styles, of)]
        after_each, (height, width) = [], sampler().size
        options = sampler().options | ({"negative_prompt": negative} if sampler().options["true_guidance"] != 1 else {})
        with pipeline.session(styles=own) as session:
            session.generate_batch(
                [prompt] * len(data["step0/latents"]),
                size=(int(width), int(height)),
                noise=data["step0/latents"],
                callback=lambda step, z: after_each.append(np.asarray(z)),
                **options,
            )
        return after_each

    def packed_end() -> np.ndarray:
        return data["final"] if "final" in data else tokens(data["final_latents"])

    for step in range(steps):
        for which in recorded(step):
            report.compare(
                f"{name} step{step}/v_{which}",
                lambda step=step, which=which: velocities(step)[which],
                data[f"step{step}/v_{which}"],
                OUTPUT,
            )
        after = data[f"step{step + 1}/latents"] if step + 1 < steps else packed_end()
        report.compare(f"{name} step{step}, the latents after it", functools.partial(following, step), after, OUTPUT)
        report.compare(f"{name} step{step}, of a session", lambda step=step: run()[step], after, OUTPUT)


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
