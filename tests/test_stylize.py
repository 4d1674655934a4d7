"""Style guidance through the public interface, against the recorded published sampler; the stylize command."""

import jax
import numpy as np
import pytest
from compare import relative
from golden import golden_dir

from lorweb_jax import Pipeline
from lorweb_jax.pipeline.request import Sampling
from lorweb_jax.pipeline.stages import NEGATIVE, PROMPT, stages

FOLDER, PAIR = golden_dir() / "tiny_pipeline", golden_dir() / "pair"


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Compiled without most optimizations: here compiling takes longer than computing."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def base():
    return Pipeline.load(FOLDER)


class RecordedTexts:
    """The recorded embeddings, in the place of the text encoders: of "content", "negative" and "content style0"."""

    image_encoder = None

    def __init__(self, data):
        self.data = data

    def prompt(self, texts):
        names = [text.rpartition(" ")[2] for text in texts]
        keys = ("encoder_hidden_states", "pooled_projections")
        return tuple(np.concatenate([self.data[f"{name}/{key}"] for name in names]) for key in keys)


def test_the_published_sampler_step_by_step(base):
    """Two styles of unequal rank, plain steps at first: latents of every step to 1e-5, one batch of all passes."""
    data = np.load(PAIR / "sample_two.npz")
    model = base.model.replace(text_encoder=None, text_encoder_2=None)
    pipeline = Pipeline(base.folder, model, RecordedTexts(data))
    styles = [pipeline.style(PAIR / f"style_{name}.safetensors", words=f"style{i}") for i, name in enumerate("ab")]
    seen = []
    height, width = (int(side) * 16 for side in data["img_ids"][:, 1:].max(axis=0) + 1)
    options = dict(
        size=(width, height),
        steps=len(data["timesteps"]) - 1,
        true_guidance=float(data["cfg"]),
        true_guidance_start=int(data["cfg_start"]),
        style_start=int(data["style_start"]),
        strengths=data["style_scales"],
        guidance=float(data["guidance"]),
        negative_prompt="negative",
        published_times=True,
        noise=data["latents"],
    )
    with pipeline.session(styles=styles) as session:
        session.generate("content", callback=lambda step, latents: seen.append(latents), **options)
    expected = [data[f"step{step}/latents"] for step in range(1, 6)] + [data["final"]]
    assert len(seen) == 6
    for latents, theirs in zip(seen, expected):
        assert relative(latents, theirs) <= 1e-5


def test_from_strings_to_latents(base):
    """The recorded published pipeline, with the folder's own tokenizers and encoders: 1e-5."""
    data = np.load(PAIR / "e2e_style.npz")
    style = base.style(PAIR / "style_a.safetensors", float(data["style_scales"][0]), str(data["style_words"]))
    seen = []
    base.stylize(
        str(data["prompt"]),
        style,
        size=(int(data["width"]), int(data["height"])),
        steps=4,
        true_guidance=float(data["cfg"]),
        style_start=int(data["style_start"]),
        guidance=float(data["guidance"]),
        negative_prompt=str(data["negative_prompt"]),
        published_times=True,
        noise=data["step0/latents"],
        callback=lambda step, latents: seen.append(latents),
    )
    for step in range(1, 4):
        assert relative(seen[step - 1], data[f"step{step}/latents"]) <= 1e-5
    final = data["final_latents"]  # [1, c, h, w]
    packed = final.reshape(1, 16, 5, 2, 7, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 35, 64)
    assert relative(seen[3], packed) <= 1e-5


def shown(strengths=(), **sampling):
    """[(first, end, passes)] of the stages."""
    return [(stage.first, stage.end, stage.passes) for stage in stages(Sampling(**sampling), strengths)]


def test_passes_that_are_not_needed_are_not_run():
    p, n = PROMPT, NEGATIVE
    assert shown((6, 3), steps=50, true_guidance=4) == [(0, 10, (p, n)), (10, 50, (p, n, 0, 1))]
    assert shown((6, 3), steps=9, true_guidance=4, style_start=0) == [(0, 9, (p, n, 0, 1))]
    assert shown((0, 3), steps=9, style_start=2) == [(0, 2, (p,)), (2, 9, (p, 1))]
    assert shown((0, 0), steps=9, true_guidance=4, style_start=2) == [(0, 9, (p, n))]
    assert shown((-1,), steps=9, true_guidance=0, style_start=2) == [(0, 2, (n,)), (2, 9, (p, n, 0))]
    late = shown((2,), steps=9, true_guidance=4, true_guidance_start=5, style_start=2)
    assert late == [(0, 2, (p,)), (2, 5, (p, 0)), (5, 9, (p, n, 0))]
    assert shown(steps=9, true_guidance=4, true_guidance_start=3) == [(0, 3, (p,)), (3, 9, (p, n))]


def test_no_strength_is_classifier_free_guidance_to_the_bit(base):
    options = dict(size=(64, 48), steps=3, seed=4)
    plain = base.generate("a dog", true_guidance=4, guidance=1.0, **options)
    style = base.style(PAIR / "style_a.safetensors", words="in ink", strength=0)
    np.testing.assert_array_equal(base.stylize("a dog", style, style_start=1, **options), plain)
