"""The Relation252K reader: layouts, bad input, and all ordered pairs of files by index arithmetic."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies, Task
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.relation252k import SideBySide


def entry(name, instruction="do it"):
    return {
        "img_name": name,
        "left_image_description": "l",
        "right_image_description": "r",
        "edit_instruction": instruction,
    }


def write_group(folder, names, labels=None):
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(folder / name)
    labels = [entry(name) for name in names] if labels is None else labels
    (folder / "labels.json").write_text(labels if isinstance(labels, str) else json.dumps(labels))


def made_up_tasks(*sizes):
    return [
        Task(f"t{t}", f"/t{t}", tuple(SideBySide(f"/t{t}/{p}.png", "", "", f"instruction {p}") for p in range(size)))
        for t, size in enumerate(sizes)
    ]


def test_layouts(tmp_path):
    write_group(tmp_path / "b" / "Group1", ["1.png", "2.png"])
    write_group(tmp_path / "a" / "some other name", ["1.png", "2.png", "3.png"])
    write_group(tmp_path / "c", ["1.png", "2.png"])
    write_group(tmp_path / "d" / "Group1", ["1.png"])
    write_group(tmp_path / "d" / "Group2", ["1.png"])
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.txt").write_text("no task")
    problems = Problems()
    tasks = read_tasks(tmp_path, problems)
    assert [(task.name, len(task.pairs)) for task in tasks] == [("a", 3), ("b", 2), ("c", 2), ("d", 2)]
    assert [tasks[3].relative(pair) for pair in tasks[3].pairs] == ["Group1/1.png", "Group2/1.png"]
    assert tasks[1].pairs[0] == SideBySide(str(tmp_path / "b/Group1/1.png"), "l", "r", "do it")
    assert len(problems) == 0 and "no problems" in problems.summary()


@pytest.mark.parametrize(
    "labels, reason",
    [
        ("", "is empty"),
        ("[{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("{}", "holds a dict"),
        ("[]", "lists no images"),
        (["1.png"], "the entry is a str"),
        ([{"edit_instruction": "x"}], "no img_name"),
        ([{"img_name": "", "edit_instruction": "x"}], "no img_name"),
        ([{"img_name": 7, "edit_instruction": "x"}], "no img_name"),
        ([{"img_name": "1.png", "edit_instruction": None}], "no edit_instruction"),
        ([entry("gone.png")], "missing"),
        ([entry("../Group1")], "leads out of the folder"),
        ([entry(".")], "no regular file"),  # a folder, not a file
        ("[" + "1" * 5000 + "]", "not valid JSON"),
        ([entry("1\0.png")], "missing"),
        ([entry("x" * 300)], "too long"),
        ([entry("1.png"), entry("2.png"), entry("1.png")], "listed again"),
        ([entry("1.png")], "1 usable pair"),
    ],
)
def test_bad_labels_are_reported_and_skipped(tmp_path, labels, reason):
    write_group(tmp_path / "good" / "Group1", ["1.png", "2.png"])
    write_group(tmp_path / "bad" / "Group1", ["1.png", "2.png"])
    file = tmp_path / "bad" / "Group1" / "labels.json"
    file.write_bytes(
        labels if isinstance(labels, bytes) else (labels if isinstance(labels, str) else json.dumps(labels)).encode()
    )
    problems = Problems()
    tasks = read_tasks(tmp_path, problems)
    assert "good" in [task.name for task in tasks]
    assert ("bad" in [task.name for task in tasks]) == ("listed again" in reason)
    assert all(problem.task == "bad" for problem in problems)
    assert any(reason in problem.reason for problem in problems), list(problems)
    assert "bad: Group1/" in problems.summary() or "1 usable pair" in reason


# Entries of labels.json that are of no use, each for a reason of its own.
BAD_ENTRIES = [
    None,
    True,
    7,
    1e400,
    "1.png",
    [],
    {},
    {"img_name": None},
    {"img_name": {"a": 1}, "edit_instruction": "x"},
    *(
        entry(name)
        for name in (
            "",
            " ",
            "\0",
            "/mnt/old_disk/2.png",
            "/etc/passwd",
            "//1.png",
            "/",
            "..",
            "../outside.png",
            "../Group1/1.png",
            "a/../1.png",
            "a/../../../outside.png",
            "C:\\images\\1.png",
            "x" * 300,
            "a/" * 3000,
            "x" * 10**5,
            "1.png\0",
            "\ud800",
            "1\udfff.png",
            "\udce9.png",
            "\x1b[2J\x07",
            "a\nb",
            "\u202egnp.1",
            "🙂.png",
            "pipe",
            "folder",
        )
    ),
    *(
        entry("1.png", instruction)
        for instruction in (None, 7, float("nan"), ["x"], {}, "\ud800", "caf\udce9", "x" * 10**5)
    ),
]


def test_one_bad_entry_never_ends_the_reading_of_the_others(tmp_path):
    """Whatever stands in an entry, the good ones are read, each bad one is reported, and all of it can be written."""
    group = tmp_path / "data" / "task" / "Group1"
    good = [entry("1.png", "put \x1b[31m a\tframe\naround it ′ é 🙂 \0"), entry("a b.png"), entry("sub/3.png", "")]
    write_group(group, ["1.png", "a b.png"], json.dumps([good[0], *BAD_ENTRIES, *good[1:]]))
    (tmp_path / "data/outside.png").write_bytes((group / "1.png").read_bytes())
    (group / "sub").mkdir()
    (group / "sub" / "3.png").symlink_to("../1.png")
    (group / "folder").mkdir()
    os.mkfifo(group / "pipe")
    problems = Problems()
    [task] = read_tasks(tmp_path / "data", problems)
    assert [Path(pair.file).relative_to(group).as_posix() for pair in task.pairs] == ["1.png", "a b.png", "sub/3.png"]
    assert [pair.instruction for pair in task.pairs] == [good[0]["edit_instruction"], "do it", ""]
    # What reads the same when it is printed is reported once.
    assert len(BAD_ENTRIES) - 3 <= len(problems) <= len(BAD_ENTRIES)
    shown = problems.summary(examples=1000)
    assert all(line.isprintable() for line in shown.split("\n")) and shown.encode().decode() == shown
    problems.write(tmp_path / "problems.json")
    assert len(json.loads((tmp_path / "problems.json").read_bytes())["skipped"]) == len(problems)


def test_an_image_at_an_absolute_path_is_skipped(tmp_path):
    """shared/cases/labels_absolute_path: a copy of a data set whose labels name a disk that is gone."""
    write_group(
        tmp_path / "task" / "Group1",
        ["0.png", "1.png"],
        json.dumps([entry("0.png"), entry("1.png"), entry("/mnt/old_disk/2.png")]),
    )
    problems = Problems()
    [task] = read_tasks(tmp_path, problems)
    [problem] = problems
    assert len(task.pairs) == 2 and problem.file == "Group1/mnt/old_disk/2.png" and "leads out" in problem.reason


def test_names_that_are_not_text_are_escaped_in_reports(tmp_path):
    """shared/cases/unreportable_name_ends_run: folder names that aren't UTF-8, after the first five problems."""
    write_group(tmp_path / "good", ["1.png", "2.png"])
    names = [b"t0", b"t1", b"t2", b"t3", b"t4", b"z\xe9", b"z\x1b[2J", b"z\n", "z\u2028".encode(), b"\xff" * 200]
    for name in names:
        os.mkdir(os.fsencode(tmp_path) + b"/" + name)
    write_group(tmp_path / os.fsdecode(b"caf\xe9"), ["1.png", "2.png"])
    problems = Problems()
    tasks = read_tasks(tmp_path, problems)
    assert [task.name for task in tasks] == ["caf\\xe9", "good"] and len(problems) == len(names)
    assert Analogies(tasks).digest() and (tmp_path / os.fsdecode(b"caf\xe9")).samefile(tasks[0].folder)
    problems.write(tmp_path / "problems.json")
    skipped = json.loads((tmp_path / "problems.json").read_bytes())["skipped"]
    assert {"z\\xe9", "z\\x1b[2J", "z\\n", "z\\u2028"} < {problem["task"] for problem in skipped}


def test_no_labels_file_at_all(tmp_path):
    write_group(tmp_path / "good", ["1.png", "2.png"])
    (tmp_path / "empty").mkdir()
    problems = Problems()
    assert [task.name for task in read_tasks(tmp_path, problems)] == ["good"]
    assert [problem.task for problem in problems] == ["empty"]


def test_bad_root(tmp_path):
    for root in (tmp_path / "missing", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="can't be listed"):
            read_tasks(root, Problems())
    with pytest.raises(UserError, match="no usable task .* it has no sub-folders"):
        (tmp_path / "empty").mkdir()
        read_tasks(tmp_path / "empty", Problems())
    write_group(tmp_path / "root" / "one", ["1.png"])
    with pytest.raises(UserError, match="one: labels.json: 1 usable"):
        read_tasks(tmp_path / "root", Problems())


def test_problems_are_kept_once_counted_and_written(tmp_path):
    problems = Problems()
    assert problems.add("t", "f", "why") and not problems.add("t", "f", "why") and problems.add("t", "é", "why")
    problems.substituted = 3
    assert "2 item(s) of 1 task(s) skipped, 3 analogies replaced" in problems.summary()
    assert "... and 1 more" in problems.summary(examples=1)
    problems.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "skipped": [{"task": "t", "file": "f", "reason": "why"}, {"task": "t", "file": "é", "reason": "why"}],
        "substituted": 3,
    }
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_file_splits_in_the_middle(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 7, 3), np.uint8)
    file = tmp_path / "odd.png"
    Image.fromarray(pixels).save(file)
    before, after = SideBySide(str(file), "", "", "").read()
    np.testing.assert_array_equal(before, pixels[:, :3])
    np.testing.assert_array_equal(after, pixels[:, 4:])
    Image.fromarray(pixels[:, :1]).save(file)
    with pytest.raises(UserError, match="1 pixel wide"):
        SideBySide(str(file), "", "", "").read()


def test_an_analogys_images_forwards_and_reversed(tmp_path):
    pairs = []
    for pair in range(2):  # 0 | 1 and 2 | 3
        columns = np.array([[[2 * pair] * 3, [2 * pair + 1] * 3]], np.uint8)
        Image.fromarray(columns).save(tmp_path / f"{pair}.png")
        pairs.append(SideBySide(str(tmp_path / f"{pair}.png"), "", "", "raise by one"))
    analogy = Analogies([Task("t", str(tmp_path), tuple(pairs))])[0]
    assert [image.max() for image in analogy.read()] == [0, 1, 2, 3] and analogy.caption == "raise by one"
    assert [image.max() for image in analogy.reverse().read()] == [1, 0, 3, 2] and analogy.reverse().caption == ""
    assert analogy.reverse().reverse() == analogy


def test_every_ordered_pair_of_different_files_of_a_task_once():
    tasks = made_up_tasks(2, 5, 3)
    analogies = Analogies(tasks)
    expected = [(t, i, j) for t, size in enumerate((2, 5, 3)) for i, j in itertools.permutations(range(size), 2)]
    assert len(analogies) == len(expected) == 2 + 20 + 6
    assert [(analogies.task_of(k), *analogies.pair_indexes(k)) for k in range(len(analogies))] == expected
    starts = (0, 2, 7)
    for analogy, (t, i, j) in zip(analogies, expected, strict=True):
        assert (analogy.task, analogy.first, analogy.second) == (f"t{t}", tasks[t].pairs[i], tasks[t].pairs[j])
        assert analogy.pair_ids == (starts[t] + i, starts[t] + j)
        assert analogy.caption == f"instruction {i}"
    assert analogies[-1] == analogies[27]
    with pytest.raises(IndexError):
        analogies[28]


def test_a_limit_spreads_over_the_pairs():
    analogies = Analogies(made_up_tasks(40, 3), limit=80)
    assert [len(analogies.span(t)) for t in range(2)] == [80, 6]
    places = [analogies.pair_indexes(k) for k in analogies.span(0)]
    assert len(set(places)) == 80 and all(i != j for i, j in places)
    for side in range(2):
        assert np.bincount([place[side] for place in places], minlength=40).max() <= 5


def test_millions_of_analogies_are_not_listed():
    analogies = Analogies(made_up_tasks(*[153] * 218))
    assert len(analogies) == 218 * 153 * 152
    assert analogies[len(analogies) - 1].pair_ids == (218 * 153 - 1, 218 * 153 - 2)


def test_bad_analogies():
    for tasks, limit, message in (
        ([], None, "no tasks"),
        (made_up_tasks(2, 1), None, "task t1 has fewer"),
        (made_up_tasks(2), 0, "limit"),
    ):
        with pytest.raises(UserError, match=message):
            Analogies(tasks, limit)


def test_digest_knows_files_but_not_the_place():
    def digest(folder, *names):
        return Analogies(
            [Task("t", folder, tuple(SideBySide(f"{folder}/{name}", "", "", "") for name in names))]
        ).digest()

    assert digest("/x", "1", "2") == digest("/y/z", "1", "2")
    assert len({digest("/x", "1", "2"), digest("/x", "2", "1"), digest("/x", "1", "3")}) == 3
