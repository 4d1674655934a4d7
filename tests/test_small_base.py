"""The small base that comes with the project: diffusers loads it and makes the same images, of edits and from text, and
it follows instructions on unseen drawings."""

import json
from pathlib import Path

import numpy as np
import pytest

from lorweb_jax import Pipeline
from lorweb_jax.data.embedded.drawings import load_drawings
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white
from lorweb_jax.small_base.evaluation import draw

FOLDER = Path(__file__).parents[1] / "assets" / "small_kontext"
TRAINING = json.loads((FOLDER / "training" / "base_transformer_config.json").read_text())
SIDE = TRAINING["data"]["size"]  # of a quadrant, px


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(FOLDER)


@pytest.fixture(scope="module")
def theirs():
    import torch
    from diffusers import FluxKontextPipeline

    pipeline = FluxKontextPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("drawings"), SIDE).part(held_out=True).images


def test_size():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 24e6


def test_diffusers_makes_the_same_edit_from_the_same_noise(pipeline, theirs, drawings):
    """Float32, three Euler steps: no pixel of the grid's last quadrant is more than one level of 255 off."""
    import torch
    from PIL import Image

    a, a2, b = (on_white(drawing) for drawing in drawings[:3])
    side = 2 * SIDE
    noise = np.random.default_rng(0).standard_normal((1, (side // 16) ** 2, 64)).astype(np.float32)
    prompt = "put a red frame around it"
    ours = pipeline.edit_batch([(a, a2, b)], [prompt], steps=3, noise=noise)[0]
    grid = Image.fromarray(np.block([[[a], [a2]], [[b], [b]]]))
    image = theirs(
        image=grid,
        prompt=prompt,
        height=side,
        width=side,
        max_area=side * side,
        _auto_resize=False,
        num_inference_steps=3,
        guidance_scale=2.5,
        latents=torch.tensor(noise),
        output_type="np",
        max_sequence_length=pipeline.folder.text_tokens,
    ).images[0]
    difference = np.abs(np.round(image[SIDE:, SIDE:] * 255) - ours)
    assert difference.max() <= 1


def test_diffusers_draws_the_same_from_text(pipeline, theirs):
    """Without an image; at a drawing's size, plain and with true guidance. Whether the base learned to draw is another
    matter."""
    import torch

    prompt = "a drawing of a red apple in openmoji style"
    for cfg in (1.0, 3.0):
        noise = np.random.default_rng(1).standard_normal((1, (SIDE // 16) ** 2, 64)).astype(np.float32)
        ours = draw(pipeline, [prompt], SIDE, steps=3, cfg=cfg, noise=noise)[0]
        image = theirs(
            prompt=prompt,
            negative_prompt="",
            true_cfg_scale=cfg,
            height=SIDE,
            width=SIDE,
            max_area=SIDE * SIDE,
            _auto_resize=False,
            num_inference_steps=3,
            guidance_scale=2.5,
            latents=torch.tensor(noise),
            output_type="np",
            max_sequence_length=pipeline.folder.text_tokens,
        ).images[0]
        assert np.abs(np.round(image * 255) - ours).max() <= 1


def test_base_follows_instructions_on_unseen_drawings(pipeline, drawings):
    """Told what to do with the last drawing, it comes nearer to the truth than doing nothing, summed over
    operations."""
    names = ["frame_red", "background_yellow", "filter_invert", "silhouette_black", "hide_left", "tint_blue"]
    done, nothing = 0.0, 0.0
    conditions = [
        (on_white(drawings[3 * i]), on_white(drawings[3 * i + 1]), on_white(drawings[3 * i + 2]))
        for i in range(len(names))
    ]
    prompts = [f"{OPERATIONS[name].specific[0]} in the last picture" for name in names]
    for name, (_, _, b), drawing, result in zip(
        names, conditions, drawings[2::3], pipeline.edit_batch(conditions, prompts, steps=8)
    ):
        truth = OPERATIONS[name].apply(drawing).astype(float)
        done += np.square(result - truth).mean()
        nothing += np.square(b - truth).mean()
    assert done < 0.5 * nothing
