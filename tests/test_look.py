"""python -m lorweb_jax.data.look: counts, sizes, captions, broken files, hours, a sheet."""

import json

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.look import main

SIZES = {"a": [(30, 30), (60, 40), (60, 40)], "b": [(30, 60), (31, 31)], "c": [(8, 8), (8, 8)]}  # width, height


@pytest.fixture
def data(tmp_path):
    """Three tasks with captions; the second loses a file, the third is of no use."""
    for task, sizes in SIZES.items():
        for number, size in enumerate(sizes):
            for side in ("before", "after"):
                file = tmp_path / "data" / task / side / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", size, (200, 40 * number, 0 if side == "before" else 255)).save(file)
            (tmp_path / "data" / task / f"{number}.txt").write_text(
                "" if task == "b" else f"edit {number % 2} | {task}"
            )
    Image.new("RGB", (60, 30)).save(tmp_path / "data/a/after/0.png")
    (tmp_path / "data/b/after/2.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "data/c/before/1.png")
    whole = (tmp_path / "data/c/before/1.png").read_bytes()
    (tmp_path / "data/c/before/1.png").write_bytes(whole[: len(whole) // 2])
    return tmp_path / "data"


def rows(text, head):
    """Cells of the table under a heading's first words."""
    lines = text[text.index(f"| {head}") :].split("\n\n")[0].splitlines()[2:]
    cells = [line.replace("\\|", "\0").strip("|").split("|") for line in lines]
    return [tuple(cell.strip().replace("\0", "|") for cell in row) for row in cells]


def test_the_report(data, tmp_path, capsys):
    main([str(data), "--rate", "0.01", "--out", str(tmp_path / "look")])
    text = (tmp_path / "look/report.md").read_text()
    printed = capsys.readouterr().out
    assert text in printed and "wrote report.md, sheet.png, problems.json in" in printed
    # 3 · 2 + 2 · 1 analogies; 8 / 0.01 s, 5 / 2 / 0.01 s
    assert "2 tasks, 5 pairs of images, 8 analogies" in text and "2 pairs of those that are listed" in text
    assert "an epoch takes 0.22 hours; after 0.07 hours" in text
    assert rows(text, "width x height") == [("60x40", "2"), ("30x30", "1"), ("30x60", "1"), ("31x31", "1")]
    assert rows(text, "aspect") == [("1:1", "2"), ("3:2", "2"), ("1:2", "1")]
    assert "In 1 pairs the image after has another shape" in text
    assert "2 of 5 pairs have an empty caption" in text
    assert "2 different ones; 2 pairs share theirs with another" in text and "10 characters: 'edit 0" in text
    assert rows(text, "most frequent") == [("edit 0 | a", "2"), ("edit 1 | a", "1")]
    skipped = json.loads((tmp_path / "look/problems.json").read_text())["skipped"]
    reasons = {(problem["task"], problem["file"]): problem["reason"] for problem in skipped}
    assert "no image of the same name" in reasons["b", "after/2.png"]
    assert "damaged" in reasons["c", "before/1.png | after/1.png"] and "1 readable pair" in reasons["c", ""]
    assert len(skipped) == 3
    assert [row[:2] for row in rows(text, "task   | file")] == [(each["task"], each["file"]) for each in skipped]
    sheet = np.asarray(Image.open(tmp_path / "look/sheet.png")).reshape(-1, 3)
    colours = {tuple(colour) for colour in np.unique(sheet, axis=0).tolist()}
    assert {(200, 40 * n, blue) for n in range(2) for blue in (0, 255)} <= colours


def test_headers_alone(data, tmp_path, capsys):
    main([str(data), "--headers", "--out", str(tmp_path / "look"), "--tasks", "1"])
    text = (tmp_path / "look/report.md").read_text()
    assert "3 tasks, 7 pairs of images" in text and "another shape" not in text and "give the examples" in text


def test_bad_input(data, tmp_path):
    out = ["--out", str(tmp_path / "look")]
    for words, sentence in (
        ([str(data / "gone"), *out], "can't be listed"),
        ([str(data), *out, "--rate", "0"], "--rate is 0.0; give a number above 0"),
        ([str(data), *out, "--tasks", "0"], "'0' is not a whole number"),
        ([str(data / "c/before"), *out], "no usable task"),
    ):
        with pytest.raises(UserError, match=sentence):
            main(words)
    assert not (tmp_path / "look").exists()
    main([str(data), *out])
    with pytest.raises(UserError, match="exists already"):
        main([str(data), *out])
    main([str(data), *out, "--overwrite"])
