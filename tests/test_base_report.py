"""The page on what a small base can do: which pictures it judges, by which truth, and that the page is whole."""

import json

import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax import base_report
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, load_sets
from lorweb_jax.data.embedded.operations import OPERATIONS, STYLES, on_white
from lorweb_jax.small_base import evaluation as base
from lorweb_jax.small_base import page as base_page

PIPELINE = golden_dir() / "tiny_pipeline"


@pytest.fixture(scope="module")
def drawings(drawing_pack):
    return load_sets(drawing_pack)


def test_edits_are_of_held_out_drawings_and_have_their_truth(drawings):
    edits = base.choose_edits(drawings, per_cell=4)
    plain = {on_white(image).tobytes(): index for index, image in enumerate(drawings.images)}
    assert {edit.family for edit in edits if edit.set_of != PHOTOGRAPH} == {
        *(o.family for o in OPERATIONS.values()),
        "style",
    }
    told = set()
    for edit in edits:
        index = plain[edit.b.tobytes()]
        assert drawings.held_out[index] and drawings.set_of[index] == edit.set_of
        assert all(drawings.held_out[plain[other.tobytes()]] for other in edit.others)
        assert np.abs(edit.truth.astype(int) - edit.b).mean() >= base.LEAST_CHANGE
        sentence = edit.prompt.removesuffix(" in the last picture")
        if edit.family == "style":
            name = next(name for name, style in STYLES.items() if sentence in style.specific)
            expected = on_white(drawings.images[drawings.twins[index, SETS.index(name)]])
        else:
            operation = next(o for o in OPERATIONS.values() if sentence in o.specific)
            assert operation.family == edit.family and not (operation.needs_shape and edit.set_of == PHOTOGRAPH)
            expected = operation.apply(drawings.images[index])
        np.testing.assert_array_equal(edit.truth, expected)
        told.add(sentence)
    assert len(told) > 0.6 * 2 * len(OPERATIONS)


def test_shares_of_edits(drawings):
    """Nearer counts one, farther and as far as the copy none; photographs don't count among drawings."""
    edit = base.choose_edits(drawings, per_cell=1)[0]

    def result(of, lpips, mse):
        return base.Result(edit._replace(family="flip", set_of=of), edit.b, mse, 0.5, lpips, 0.5)

    figures = base_page.edit_figures(
        [result(0, 0.1, 0.1), result(0, 0.5, 0.6), result(2, 0.2, 0.4), result(5, 0.9, 0.1)]
    )
    assert figures["lpips"] == {"flip": {"drawings": 0.667, "openmoji": 0.5, "noto": 1.0, "photograph": 0.0}}
    assert figures["mse"] == {"flip": {"drawings": 0.667, "openmoji": 0.5, "noto": 1.0, "photograph": 1.0}}
    assert (figures["families_at_least_60_percent"], figures["families_at_least_85_percent"]) == (1, 0)


def test_what_copying_and_the_truth_score(drawings, monkeypatch):
    """A base that returns the truth is nearer everywhere; one that returns b nowhere."""
    edits = base.choose_edits(drawings, per_cell=1)[:12]

    class Answers:
        def __init__(self, name):
            self.answers = [getattr(edit, name) for edit in edits]

        def edit_batch(self, conditions, prompts, **sampling):
            return self.answers[: len(conditions)]

    for name, share in (("truth", 1.0), ("b", 0.0)):
        results = base.measure_edits(Answers(name), edits, steps=1)
        assert base.share_nearer(results, "lpips") == base.share_nearer(results, "mse") == share


def test_guidance_moves_away_from_the_empty_caption():
    """With cfg 0 a picture is what the empty caption gives; with 1 it depends on the caption alone."""
    from lorweb_jax.pipeline.pipeline import Pipeline

    pipeline = Pipeline.load(PIPELINE)
    sampling = dict(side=64, steps=1)
    words = ["a cat", "a dog"]
    np.testing.assert_array_equal(
        base.draw(pipeline, words, cfg=0.0, **sampling), base.draw(pipeline, ["", ""], cfg=1.0, **sampling)
    )
    first, _ = base.draw(pipeline, words, cfg=1.0, **sampling)
    np.testing.assert_array_equal(base.draw(pipeline, words[:1] * 2, cfg=1.0, **sampling)[0], first)
    assert np.abs(base.draw(pipeline, words[1:] * 2, cfg=1.0, **sampling)[0].astype(int) - first).max() > 0


def test_page(tmp_path, drawing_pack, monkeypatch, quick_compiles):
    monkeypatch.setattr(base, "KINDS", ("face", "fruit", "mammal"))
    monkeypatch.setattr(base_page, "NAMES", ("cat", "robot"))
    monkeypatch.setattr(base, "families", lambda: ["flip", "background", "style"])
    base_report.main(
        [
            str(PIPELINE),
            "--drawings",
            str(drawing_pack),
            "--out",
            str(tmp_path),
            "--per-cell",
            "1",
            "--samples",
            "1",
            "--steps",
            "1",
        ]
    )
    page = (tmp_path / "report.md").read_text()
    figures = json.loads((tmp_path / "figures.json").read_text())
    for part in ("\n| flip ", "\n| background ", "\n| style ", "Text to image", "15 pictures of 3 kinds", "dB"):
        assert part in page
    assert figures["edits"]["pictures"] == 3 * 5 + 1 and 0 <= figures["text_to_image"]["right"] <= 1
    assert figures["reconstruction"]["noto"]["plain"] > 0
    for line in page.splitlines():
        if line.startswith("!["):
            for name in line.split("](")[1:]:
                assert (tmp_path / name.split(")")[0]).stat().st_size > 1000


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        base_report.parse([str(tmp_path / "none")])
