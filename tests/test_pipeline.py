"""The public pipeline, end to end, against the recorded published run and against diffusers."""

import numpy as np
import pytest
from golden import golden_dir
from safetensors import safe_open

from lorweb_jax import Mix, Pipeline, UserError
from lorweb_jax.pipeline.request import edit_request


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden_dir() / "e2e_square.npz")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(golden_dir() / "tiny_pipeline").attach(golden_dir() / "basis_a.safetensors")


def images(recorded):
    return recorded["image_a"], recorded["image_atag"], recorded["image_b"]


def edit(pipeline, recorded, **options):
    return pipeline.edit_batch(
        [images(recorded)],
        [str(recorded["prompt"])],
        steps=4,
        guidance=float(recorded["guidance_scale"]),
        noise=recorded["latents_packed"],
        **options,
    )[0]


@pytest.mark.parametrize("folded", [False, True])
def test_whole_edit_is_the_published_one(pipeline, recorded, folded):
    """From three images to the cropped result, at most one level of 255 off."""
    result = edit(pipeline, recorded, folded=folded)
    difference = np.abs(result.astype(int) - recorded["image_out_cropped"])
    assert difference.max() <= 1


def test_base_ignores_basis(pipeline, recorded):
    plain = Pipeline.load(golden_dir() / "tiny_pipeline")
    assert np.array_equal(edit(plain, recorded), edit(pipeline, recorded, use_basis=False))


def test_bad_requests(pipeline, recorded):
    with pytest.raises(UserError, match="steps"):
        pipeline.edit(*images(recorded), steps=0)
    with pytest.raises(UserError, match="different sizes"):
        a, a2, b = images(recorded)
        pipeline.edit_batch([(a, a2, b), (a[:32], a2, b)], ["", ""])
    with pytest.raises(UserError, match="no basis"):
        Pipeline.load(golden_dir() / "tiny_pipeline").coefficients(*images(recorded))


def test_a_mix_in_the_routers_place(pipeline, recorded):
    """The router's own mix makes the same image, also by way of others; one member makes another image."""
    router = pipeline.coefficients(*images(recorded))
    same = edit(pipeline, recorded, mix=router, folded=False)
    assert np.array_equal(same, edit(pipeline, recorded, folded=False))
    first = pipeline.mix(0)
    assert np.array_equal(same, edit(pipeline, recorded, mix=Mix.lerp(first, router, 1), folded=False))
    assert not np.array_equal(same, edit(pipeline, recorded, mix=first))
    nothing = edit(pipeline, recorded, mix=router - router, folded=False)
    assert np.array_equal(nothing, edit(pipeline, recorded, use_basis=False))


def test_a_mix_for_each_analogy(pipeline, recorded):
    """Two analogies with a mix each are what each is with its own; a number of mixes that fits nothing is refused."""
    mixes, noise = [pipeline.mix(0), pipeline.coefficients(*images(recorded))], recorded["latents_packed"]
    prompts = [str(recorded["prompt"])] * 2
    options = {"steps": 4, "guidance": float(recorded["guidance_scale"]), "noise": np.concatenate([noise, noise])}
    both = pipeline.edit_batch([images(recorded)] * 2, prompts, mix=mixes, **options)
    for image, mix in zip(both, mixes):
        alone = edit(pipeline, recorded, mix=mix, folded=False)
        assert np.abs(image.astype(int) - alone).max() <= 1
    with pytest.raises(UserError, match="3 mixes were given for 2 analogies"):
        pipeline.edit_batch([images(recorded)] * 2, prompts, mix=[*mixes, mixes[0]], **options)


def test_files_that_a_pipeline_saves(pipeline, recorded, tmp_path):
    """The published format byte for byte, and one mix as a LoRA that makes the same image."""
    pipeline.save_basis(tmp_path / "basis.safetensors", dtype="float32")
    with (
        safe_open(golden_dir() / "basis_a.safetensors", "np") as theirs,
        safe_open(tmp_path / "basis.safetensors", "np") as ours,
    ):
        assert set(theirs.keys()) == set(ours.keys())
        assert all(np.array_equal(theirs.get_tensor(key), ours.get_tensor(key)) for key in theirs.keys())
    assert pipeline.save_lora(tmp_path / "lora.safetensors", pipeline.coefficients(*images(recorded))) is None
    lora = Pipeline.load(golden_dir() / "tiny_pipeline").attach(tmp_path / "lora.safetensors")
    difference = np.abs(edit(lora, recorded).astype(int) - edit(pipeline, recorded))
    assert difference.max() <= 1


def test_a_seed_for_each_image(pipeline, recorded):
    """Each has the noise that it has when it is made alone, whatever stands beside it."""
    noise = lambda seed, count: (
        edit_request(pipeline.folder, [images(recorded)] * count, [""] * count, {"seed": seed})[1].noise
    )
    both = noise([7, 3], 2)
    np.testing.assert_array_equal(both, np.concatenate([noise(7, 1), noise(3, 1)]))
    assert not np.array_equal(noise(7, 2)[1], both[1])
    for seed, message in (([1], "1 seeds were given for 2 images"), ([1, -1], "the seed is -1")):
        with pytest.raises(UserError, match=message):
            noise(seed, 2)
