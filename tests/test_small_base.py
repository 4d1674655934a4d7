"""The small base that comes with the project: diffusers loads it, and it follows instructions on unseen drawings."""

from pathlib import Path

import numpy as np
import pytest

from lorweb_jax import Pipeline
from lorweb_jax.data.drawings import load_drawings
from lorweb_jax.data.operations import OPERATIONS, on_white

FOLDER = Path(__file__).parents[1] / "assets" / "small_kontext"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(FOLDER)


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    return load_drawings(tmp_path_factory.mktemp("drawings")).part(held_out=True).images


def test_size():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) < 20e6


def test_diffusers_makes_the_same_image_from_the_same_noise(pipeline, drawings):
    """Float32, three Euler steps: no pixel of the grid's last quadrant is more than one level of 255 off."""
    import torch
    from diffusers import FluxKontextPipeline
    from PIL import Image

    a, a2, b = (on_white(drawing) for drawing in drawings[:3])
    noise = np.random.default_rng(0).standard_normal((1, 16, 64)).astype(np.float32)
    prompt = "put a red frame around it"
    ours = pipeline.edit_batch([(a, a2, b)], [prompt], steps=3, noise=noise)[0]

    theirs = FluxKontextPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    grid = Image.fromarray(np.block([[[a], [a2]], [[b], [b]]]))
    image = theirs(image=grid, prompt=prompt, height=64, width=64, max_area=64 * 64, _auto_resize=False,
                   num_inference_steps=3, guidance_scale=2.5, latents=torch.tensor(noise), output_type="np",
                   max_sequence_length=pipeline.folder.text_tokens).images[0]
    difference = np.abs(np.round(image[32:, 32:] * 255) - ours)
    assert difference.max() <= 1


def test_base_follows_instructions_on_unseen_drawings(pipeline, drawings):
    """Told what to do with the last drawing, it comes nearer to the truth than doing nothing, summed over operations."""
    names = ["frame_red", "background_yellow", "filter_invert", "silhouette_black", "hide_left", "tint_blue"]
    done, nothing = 0.0, 0.0
    conditions = [(on_white(drawings[3 * i]), on_white(drawings[3 * i + 1]), on_white(drawings[3 * i + 2]))
                  for i in range(len(names))]
    prompts = [f"{OPERATIONS[name].specific[0]} in the last picture" for name in names]
    for name, (_, _, b), drawing, result in zip(names, conditions, drawings[2::3],
                                                pipeline.edit_batch(conditions, prompts, steps=8)):
        truth = OPERATIONS[name].apply(drawing).astype(float)
        done += np.square(result - truth).mean()
        nothing += np.square(b - truth).mean()
    assert done < 0.5 * nothing
