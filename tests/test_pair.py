"""Pair Customization: how its adapters begin, its files, its augmentation, its guidance (method.md §7).

What recordings hold (tests/golden/pair) is compared by test_parity.py.
"""

import dataclasses
import json

import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.formats import pair_file
from lorweb_jax.common.errors import UserError
from lorweb_jax.data import pair as pair_data
from lorweb_jax.flow.guidance import StyleGuidance
from lorweb_jax.flow.sampling import TrueGuidance
from lorweb_jax.flow.schedule import pair_times
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone

FOLDER = golden_dir() / "pair"
LAYERS = backbone(
    FluxConfig.from_json(json.loads((golden_dir() / "tiny_pipeline" / "transformer" / "config.json").read_text()))
).adapted


# How the adapters begin


def test_fresh_rows_are_orthonormal_and_seeded():
    a = np.concatenate(pair.fresh_rows(np.random.default_rng(3), 640, (32, 8)))
    assert a.dtype == np.float32 and a.shape == (40, 640)
    assert np.abs(a.astype(np.float64) @ a.T.astype(np.float64) - np.eye(40)).max() < 1e-5
    assert np.array_equal(a, np.concatenate(pair.fresh_rows(np.random.default_rng(3), 640, (32, 8))))


def test_free_rows_have_the_variance_of_their_rank():
    rows = pair.free_rows(np.random.default_rng(0), 20_000, 4)
    assert rows.shape == (4, 20_000) and rows.std() == pytest.approx(1 / 4, rel=0.02)


def test_ranks_beyond_the_width_are_refused():
    for make in (
        lambda: pair.fresh_rows(np.random.default_rng(0), 40, (20, 21)),
        lambda: pair.orthonormal_rows(np.zeros((40, 40), np.float32), (20, 21)),
    ):
        with pytest.raises(UserError, match="20 and 21 need 41 orthonormal rows.* 40 wide.*at most 40"):
            make()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("even", (0, 2, 4)),
        ("odd", (1, 3)),
        ("all", (0, 1, 2, 3, 4)),
        ("none", ()),
        ("0-2,4", (0, 1, 2, 4)),
        ((3, 1), (1, 3)),
    ],
)
def test_lists_of_blocks(text, expected):
    assert pair.parse_blocks(text, 5, "pair.content") == expected


@pytest.mark.parametrize("text", ["evens", "1-", "0-9", "3-1", "0,4-2", "-1", (5,), "2,x"])
def test_lists_that_name_no_blocks_are_refused(text):
    with pytest.raises(UserError, match=r"pair\.content"):
        pair.parse_blocks(text, 5, "pair.content")


# Files


def test_members_of_unequal_rank_are_stacked():
    members = [
        pair_file.read_member(FOLDER / f"{name}.safetensors", LAYERS) for name in ("style_a", "style_b", "style_d")
    ]
    arrays = pair.stack(members, LAYERS)
    for number, member in enumerate(members):
        for path in member.blocks:
            a, b = arrays[path]["a"][:, number], arrays[path]["b"][:, number]
            assert np.array_equal(a[..., : member.rank].transpose(0, 2, 1), member.a[path])
            assert np.array_equal(b[:, : member.rank], member.b[path])
            assert not a[..., member.rank :].any() and not b[:, member.rank :].any()


def test_a_member_whose_q_and_k_differ_in_a_is_refused(tmp_path):
    member = pair_file.read_member(FOLDER / "style_a.safetensors", LAYERS)
    member.a["transformer_blocks.attn.to_k"][1, 0, 0] += 1
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.attn\.to_k has another A"):
        pair_file.write_member(tmp_path / "x.safetensors", member)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    narrow = {path: dataclasses.replace(layer, inputs=layer.inputs // 2) for path, layer in LAYERS.items()}
    with pytest.raises(UserError, match="expected down .*use the file with its own model"):
        pair_file.read_member(FOLDER / "style_a.safetensors", narrow)
    with pytest.raises(UserError, match="no adapter of Pair Customization"):
        pair_file.read_member(golden_dir() / "basis_a.safetensors", LAYERS)


# Images


def test_the_centred_crop_is_the_recorded_one():
    recorded = np.load(FOLDER / "augment.npz")
    shape = recorded["content_image"].shape
    resized = pair_data.resized_shape(shape, "as it is", int(recorded["size"]))
    crop = pair_data.largest_crop(resized, shape[1] / shape[0])
    assert crop == tuple(recorded["1/crop_top_left_height_width"])


def test_draws():
    """Ratios and flips uniform, areas uniform over 0.75 to 1 where a crop fits, crops inside the image; seeded."""
    shape, size = (512, 512, 3), 512
    draws = [pair_data.draw(np.random.default_rng(seed), shape, size) for seed in range(2000)]
    assert draws[:5] == [pair_data.draw(np.random.default_rng(seed), shape, size) for seed in range(5)]
    counts = {ratio: sum(draw.ratio == ratio for draw in draws) for ratio in pair_data.RATIOS}
    assert min(counts.values()) > 430 and abs(sum(draw.flip for draw in draws) - 1000) < 100
    areas = np.array([draw.crop[2] * draw.crop[3] / 512**2 for draw in draws if draw.ratio == "1:1"])
    assert 0.745 < areas.min() and areas.max() <= 1 and areas.mean() == pytest.approx(0.875, abs=0.01)
    for draw in draws:
        height, width = pair_data.resized_shape(shape, draw.ratio, size)
        top, left, h, w = draw.crop
        assert 0 <= top <= height - h and 0 <= left <= width - w


def test_an_image_too_narrow_is_refused():
    with pytest.raises(UserError, match="a side shorter than 32 pixels"):
        pair_data.resized_shape((20, 200, 3), "as it is", 64)


# Guidance


def test_style_guidance_is_the_formula():
    """Float64; and with no strength it is classifier-free guidance to the bit."""
    rng = np.random.default_rng(0)
    prompt, negative, *styles = v = rng.standard_normal((4, 2, 5, 3)).astype(np.float32)
    expected = negative + 4.0 * (prompt.astype(np.float64) - negative)
    for strength, style in zip((6.0, -2.5), styles):
        expected += strength * (style.astype(np.float64) - prompt)
    guidance = StyleGuidance.of(4.0, (6.0, -2.5))
    assert guidance.passes == 4
    np.testing.assert_allclose(guidance(v), expected, rtol=0, atol=1e-5)
    plain = TrueGuidance(np.float32(4.0))(v[:2])
    np.testing.assert_array_equal(StyleGuidance.of(4.0, (0.0, 0.0))(v), plain)


def test_times_of_training():
    """e^μ/(e^μ + 1/s − 1) of s = 1 − k/999, in float64; 1 and 0 included."""
    with np.errstate(divide="ignore"):
        s = 1 - np.arange(1000) / 999
        expected = np.exp(1.15) / (np.exp(1.15) + 1 / s - 1)
    times = pair_times()
    np.testing.assert_allclose(times, expected, atol=1e-6)
    assert times[0] == 1 and times[-1] == 0
