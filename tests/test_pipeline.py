"""The public pipeline, end to end, against the recorded published run and against diffusers."""

import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax import Pipeline, UserError


@pytest.fixture(scope="module")
def recorded():
    return np.load(golden_dir() / "e2e_square.npz")


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(golden_dir() / "tiny_pipeline").attach(golden_dir() / "basis_a.safetensors")


def images(recorded):
    return recorded["image_a"], recorded["image_atag"], recorded["image_b"]


def edit(pipeline, recorded, **options):
    return pipeline.edit_batch([images(recorded)], [str(recorded["prompt"])], steps=4,
                               guidance=float(recorded["guidance_scale"]), noise=recorded["latents_packed"],
                               **options)[0]


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
