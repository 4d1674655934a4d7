"""The small base that comes with the project: diffusers loads it and makes the same images, of edits and from text, and
it follows instructions on unseen drawings."""

import json
from pathlib import Path

import numpy as np
import pytest

from lorweb_jax import Pipeline
from lorweb_jax.data.embedded.drawings import load_drawings
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white

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
    from PIL import Image

    a, a2, b = (on_white(drawing) for drawing in drawings[:3])
    size, prompt = (2 * SIDE, 2 * SIDE), "put a red frame around it"
    noise = noise_of(size, seed=0)
    ours = pipeline.edit_batch([(a, a2, b)], [prompt], steps=3, noise=noise)[0]
    grid = Image.fromarray(np.block([[[a], [a2]], [[b], [b]]]))
    image = their_image(theirs, pipeline, prompt, size, noise, image=grid, guidance_scale=2.5)
    assert np.abs(image[SIDE:, SIDE:] - ours).max() <= 1


def their_image(theirs, pipeline, prompt, size, noise, **options):
    """diffusers' levels [H, W, 3] after three steps; size = (width, height)."""
    import torch

    image = theirs(
        prompt=prompt,
        width=size[0],
        height=size[1],
        max_area=size[0] * size[1],
        _auto_resize=False,
        num_inference_steps=3,
        latents=torch.tensor(noise),
        output_type="np",
        max_sequence_length=pipeline.folder.text_tokens,
        **options,
    ).images[0]
    return np.round(image * 255)


def noise_of(size, seed=1):
    return np.random.default_rng(seed).standard_normal((1, size[0] * size[1] // 256, 64)).astype(np.float32)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_diffusers_draws_the_same_from_text(pipeline, theirs, cfg):
    """Without an image; at a drawing's size, plain and with true guidance. Whether the base learned to draw is another
    matter."""
    prompt, size = "a drawing of a red apple in openmoji style", (SIDE, SIDE)
    noise = noise_of(size)
    ours = pipeline.generate(prompt, size=size, steps=3, guidance=2.5, true_guidance=cfg, noise=noise)
    image = their_image(
        theirs, pipeline, prompt, size, noise, negative_prompt="", true_cfg_scale=cfg, guidance_scale=2.5
    )
    assert np.abs(image - ours).max() <= 1


def test_diffusers_edits_an_image_by_instruction(pipeline, theirs, drawings):
    """A reference of another shape than the result, true guidance against a negative prompt, Kontext's own guidance."""
    from PIL import Image

    b, size = on_white(drawings[4])[: SIDE // 2], (SIDE, SIDE + 16)
    prompt, noise = "put a red frame around it", noise_of(size)
    ours = pipeline.generate(
        prompt, b, size=size, steps=3, true_guidance=2.0, negative_prompt="a blue frame", noise=noise
    )
    image = their_image(
        theirs,
        pipeline,
        prompt,
        size,
        noise,
        image=Image.fromarray(b),
        negative_prompt="a blue frame",
        true_cfg_scale=2.0,
    )
    assert ours.shape == (SIDE + 16, SIDE, 3) and np.abs(image - ours).max() <= 1


def test_several_references(pipeline, theirs, drawings):
    """diffusers' pipeline takes one; its parts, run by hand, take two: tokens one after the other, t = 1 and 2."""
    import torch

    images = [on_white(drawings[4]), on_white(drawings[5])[:, : SIDE // 2]]
    prompt, size = "both in one picture", (SIDE, SIDE)
    noise = noise_of(size)
    ours = pipeline.generate(prompt, images, size=size, steps=3, noise=noise)
    with torch.no_grad():
        text, pooled, text_ids = theirs.encode_prompt(prompt, None, max_sequence_length=pipeline.folder.text_tokens)
        tokens = [torch.tensor(noise)]
        ids = [theirs._prepare_latent_image_ids(1, SIDE // 16, SIDE // 16, "cpu", torch.float32)]
        for t, image in enumerate(images, 1):
            pixels = theirs.image_processor.preprocess(torch.tensor(image / 255).permute(2, 0, 1)[None].float())
            latents = theirs._encode_vae_image(pixels, None)
            height, width = latents.shape[2:]
            tokens.append(theirs._pack_latents(latents, 1, 16, height, width))
            ids.append(theirs._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32))
            ids[-1][:, 0] = t
        z, sigmas = tokens[0], pipeline.folder.schedule.sigmas(3, noise.shape[1])
        for sigma, after in zip(sigmas, sigmas[1:]):
            v = theirs.transformer(
                hidden_states=torch.cat([z, *tokens[1:]], 1),
                timestep=torch.tensor([sigma]),
                guidance=torch.tensor([3.5]),
                pooled_projections=pooled,
                encoder_hidden_states=text,
                txt_ids=text_ids,
                img_ids=torch.cat(ids),
                return_dict=False,
            )[0]
            z = z + float(after - sigma) * v[:, : z.shape[1]]
        z = theirs._unpack_latents(z, SIDE, SIDE, theirs.vae_scale_factor)
        decoded = theirs.vae.decode(z / theirs.vae.config.scaling_factor + theirs.vae.config.shift_factor).sample
    image = theirs.image_processor.postprocess(decoded, output_type="np")[0]
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
