"""Layouts of data beside Relation252K's: what each gives, and what is said of bad input."""

import contextlib
import io
import json
import pickle
import sys
import tarfile

import datasets
import mutations
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data import saved
from lorweb_jax.data.analogies import Analogies, contents
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems


def pixels(name):
    """uint8 [8, 12, 3] of an image's name: noise that nothing else has."""
    return np.random.default_rng(list(name.encode())).integers(0, 256, (8, 12, 3), np.uint8)


def write(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(pixels(f"{folder.name}/{name.split('.')[0]}")).save(folder / name)


def read(root):
    problems = Problems()
    tasks = read_tasks(root, problems)
    return {task.name: task for task in tasks}, [(p.task, p.file, p.reason) for p in problems]


def captions(task):
    return [pair.instruction for pair in task.pairs]


def assert_holds(task, *names):
    """The pairs' images are before/name and after/name, in this order."""
    assert len(task.pairs) == len(names)
    for pair, name in zip(task.pairs, names):
        images = pair.read()
        for image, side in zip(images, ("before", "after"), strict=True):
            np.testing.assert_array_equal(image, pixels(f"{side}/{name}"))
        assert pair.size() == images[0].shape[1::-1] and min(pair.nbytes()) > 0 and pair.changed() > 0


def test_folders_of_pairs(tmp_path):
    for task in ("frame", "blur"):
        for side in ("before", "after"):
            write(tmp_path / task / side, "1.png", "2.png")
    write(tmp_path / "frame/before", "3.png")
    write(tmp_path / "frame/after", "3.bmp")  # another suffix is the same name
    (tmp_path / "frame/1.txt").write_text("one\n")
    (tmp_path / "frame/after/2.txt").write_text("two")
    (tmp_path / "frame/caption.txt").write_text("any")
    tasks, problems = read(tmp_path)
    assert list(tasks) == ["blur", "frame"] and not problems
    assert captions(tasks["frame"]) == ["one", "two", "any"] and captions(tasks["blur"]) == ["", ""]
    assert_holds(tasks["frame"], "1", "2", "3")
    assert tasks["frame"].relative(tasks["frame"].pairs[2]) == "before/3.png | after/3.bmp"
    one, problems = read(tmp_path / "blur")  # a task alone
    assert list(one) == ["blur"] and one["blur"] == tasks["blur"] and not problems


def test_folders_of_pairs_with_problems(tmp_path):
    for side in ("before", "after"):
        write(tmp_path / "t" / side, "1.png", "2.png", "3.png", "4.png")
        write(tmp_path / "lonely" / side, "1.png")
    write(tmp_path / "t/before", "1.bmp", "5.png")
    write(tmp_path / "t/after", "6.png")
    for name in "12":
        (tmp_path / f"t/{name}.txt").write_text("words")
    (tmp_path / "t/3.txt").write_bytes(b"\xff\xfe\x00")
    tasks, problems = read(tmp_path)
    assert list(tasks) == ["t"] and captions(tasks["t"]) == ["words", "words"]
    expected = {
        ("lonely", "", "1 usable pair"),
        ("t", "before/1.png", "has the name of 1.bmp"),
        ("t", "before/5.png", "no image of the same name in after"),
        ("t", "after/6.png", "no image of the same name in before"),
        ("t", "3.txt", "not UTF-8"),
        ("t", "before/4.png", "no caption, while others"),
    }
    assert len(problems) == len(expected)
    for task, file, reason in expected:
        assert any((task, file) == problem[:2] and reason in problem[2] for problem in problems), (file, problems)


ROWS = [
    {"before": "before/1.png", "after": "after/1.png", "caption": 'a, "b" c', "task": "x"},
    {"before": "before/2.png", "after": "after/2.png", "caption": "two", "task": "x"},
    {"before": "before/3.png", "after": "after/3.png", "caption": "three", "task": "y"},
    {"before": "before/1.png", "after": "after/3.png", "caption": "four", "task": "y"},
]


def write_table(folder, kind, rows):
    file = folder / f"pairs.{kind}"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if kind == "csv":
        cells = [['"' + str(row.get(name) or "").replace('"', '""') + '"' for name in columns] for row in rows]
        file.write_text("\n".join([",".join(columns), *map(",".join, cells)]), encoding="utf-8-sig")
    elif kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        columns = {name: [row.get(name) for row in rows] for name in columns}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file


@pytest.fixture
def images(tmp_path):
    for side in ("before", "after"):
        write(tmp_path / side, "1.png", "2.png", "3.png")
    return tmp_path


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables(images, kind):
    tasks, problems = read(write_table(images, kind, ROWS))
    assert not problems and list(tasks) == ["x", "y"]
    assert captions(tasks["x"]) == ['a, "b" c', "two"] and captions(tasks["y"]) == ["three", "four"]
    assert_holds(tasks["x"], "1", "2")
    np.testing.assert_array_equal(tasks["y"].pairs[1].read()[1], pixels("after/3"))
    without = [{name: row[name] for name in ("before", "after")} for row in ROWS]
    tasks, problems = read(write_table(images, kind, without))
    assert not problems and list(tasks) == ["pairs"] and captions(tasks["pairs"]) == [""] * 4


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_bad_rows_are_reported_and_skipped(images, kind):
    (images.parent / "outside.png").write_bytes((images / "before/1.png").read_bytes())
    bad = [
        ({"before": "before/9.png"}, "no image file before/9.png"),
        ({"before": "../outside.png"}, "does not lie in its folder"),
        ({"after": str(images / "after/1.png")}, "does not lie in its folder"),
        ({"after": "after"}, "no image file after"),
        ({"after": None}, "no path in the column after"),
        ({"caption": None}, "no caption, while others"),
        ({"caption": "x" * 30_000}, "30,000 characters"),
    ]
    tasks, problems = read(
        write_table(images, kind, [*ROWS[:2], *(ROWS[0] | row for row, _ in bad), ROWS[1], *ROWS[2:]])
    )
    assert [len(task.pairs) for task in tasks.values()] == [2, 2]
    *rows, again = problems
    assert [reason in row[2] for row, (_, reason) in zip(rows, bad, strict=True)] == [True] * len(bad), rows
    assert all(row[0] == "x" and "pairs." in row[1] for row in rows)
    assert again == ("x", "before/2.png | after/2.png", "is listed again; the first counts")


def test_lines_that_are_no_rows(images):
    table = write_table(images, "jsonl", ROWS)
    table.write_text('[1]\n{"before"\n' + "[" * 100_000 + "\n" + table.read_text())
    tasks, problems = read(table)
    assert len(tasks) == 2 and [file for _, file, _ in problems] == [f"pairs.jsonl line {n}" for n in (1, 2, 3)]
    table = write_table(images, "csv", ROWS)
    table.write_text(table.read_text(encoding="utf-8-sig").replace("three", 'three","and,more'))
    tasks, problems = read(table)
    assert list(tasks) == ["x"] and "more values" in problems[0][2] and "1 usable pair" in problems[1][2]


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("gone.csv", None, "does not exist"),
        ("a.csv", b"", "has no rows"),
        ("a.csv", b"input;output\nbefore/1.png;after/1.png", "its columns are input;output: rename"),
        ("a.csv", b'before,after\n"a"b,c', "no csv with commas"),
        ("a.csv", b"before,after\na,\xff", "not UTF-8"),
        ("a.csv", b"before,after\na,b", "no usable task .* no image file a,"),
        ("a.jsonl", b'{"before": "a"}', "no row of .* has both"),
        ("a.parquet", b"PAR1 and rubbish", "no intact parquet file"),
        (".", None, "no usable task .* the table pairs.csv, which is read if its own path is given"),
    ],
)
def test_bad_tables(images, name, content, sentence):
    if content is not None:
        (images / name).write_bytes(content)
    write_table(images, "csv", ROWS)
    for side in ("before", "after"):
        (images / side).rename(images / f".{side}")
    with pytest.raises(UserError, match=f"(?s){sentence}") as error:
        read(images / name)
    assert str(images / name).removesuffix("/.") in str(error.value)


def test_parquet_without_its_library(images, monkeypatch):
    table = write_table(images, "parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"package pyarrow is needed.*pip install 'lorweb_jax\[parquet\]'"):
        read(table)


def test_fingerprints_know_both_files_but_not_the_place(images, tmp_path_factory):
    def both(root):
        tasks = read_tasks(root, Problems())
        return Analogies(tasks).digest(), contents(tasks)

    first = both(write_table(images, "csv", ROWS))
    other = tmp_path_factory.mktemp("other") / "copy"
    images.rename(other)
    assert both(other / "pairs.csv") == first
    Image.fromarray(pixels("x")[:4]).save(other / "after/3.png")
    assert both(other / "pairs.csv")[0] == first[0] and both(other / "pairs.csv")[1] != first[1]
    assert both(write_table(other, "csv", [*ROWS[:3], ROWS[3] | {"after": "after/2.png"}]))[0] != first[0]


def encoded(place):
    with io.BytesIO() as file:
        Image.fromarray(pixels(place)).save(file, "PNG")
        return file.getvalue()


def save_dataset(folder, rows):
    """Rows of TABLE's form as the library datasets saves them, with images in the place of paths."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    for side in {"before", "after"} & columns.keys():
        columns[side] = [place and {"bytes": encoded(place.split(".")[0]), "path": None} for place in columns[side]]
    dataset = datasets.Dataset.from_dict(columns)
    for side in {"before", "after"} & columns.keys():
        dataset = dataset.cast_column(side, datasets.Image())
    dataset.save_to_disk(folder)
    return folder


def test_a_saved_data_set(tmp_path):
    tasks, problems = read(save_dataset(tmp_path / "set", ROWS))
    assert not problems and list(tasks) == ["x", "y"]
    assert captions(tasks["x"]) == ['a, "b" c', "two"] and captions(tasks["y"]) == ["three", "four"]
    assert_holds(tasks["x"], "1", "2")
    assert tasks["y"].relative(tasks["y"].pairs[1]) == "row 3"
    assert tasks["x"].pairs[0].nbytes() == (len(encoded("before/1")), len(encoded("after/1")))
    assert pickle.loads(pickle.dumps(tasks["y"])) == tasks["y"]
    without = [{name: row[name] for name in ("before", "after")} for row in ROWS]
    tasks, problems = read(save_dataset(tmp_path / "plain", without))
    assert not problems and captions(tasks["plain"]) == [""] * 4
    bad = [ROWS[0] | {"after": None}, ROWS[0] | {"caption": None}, *ROWS]
    tasks, problems = read(save_dataset(tmp_path / "bad", bad))
    assert list(tasks) == ["x", "y"] and [problem[:2] for problem in problems] == [("x", "row 0"), ("x", "row 1")]
    assert "no image in the column after" in problems[0][2] and "no caption" in problems[1][2]


def test_bad_saved_data_sets(tmp_path, monkeypatch):
    def refused(folder, sentence):
        with pytest.raises(UserError, match=sentence):
            read(folder)

    rows = [{"input": "before/1.png", "prompt": "a"}]
    refused(save_dataset(tmp_path / "a", rows), "no row of .*its columns are row, input, prompt")
    datasets.Dataset.from_dict({"before": ["1.png"], "after": ["2.png"]}).save_to_disk(tmp_path / "b")
    refused(tmp_path / "b", "the column before of .*images were expected; cast it")
    whole = save_dataset(tmp_path / "c", ROWS)
    for file in whole.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    refused(whole, "is no intact data set")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name in ("train", "test"):
        save_dataset(tmp_path / "d" / name, ROWS)
    refused(tmp_path / "d", r"several splits of a data set \(test, train\); give the folder of one, such as .*/d/test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path / "d/train", r"package datasets is needed.*pip install 'lorweb_jax\[datasets\]'")


def write_shard(file, samples):
    with webdataset.TarWriter(str(file)) as writer:
        for sample in samples:
            writer.write(sample)


def sample(key, name, **texts):
    return {"__key__": key, "before.png": encoded(f"before/{name}"), "after.png": encoded(f"after/{name}"), **texts}


def test_a_sample_names_its_task_by_a_number(tmp_path):
    """0 among them, which counts before the folder in the key, as others do."""
    numbered = [sample(f"frame/{i}", "1", json={"caption": "a", "task": i // 2}) for i in range(4)]
    write_shard(tmp_path / "0.tar", numbered)
    tasks, problems = read(tmp_path)
    assert list(tasks) == ["0", "1"] and not problems


def test_shards(tmp_path):
    """Written by webdataset; its own reader, from one end to the other, gives the same samples."""
    write_shard(tmp_path / "0.tar", [sample("frame/0", "1", txt="one"), sample("frame/1", "2", txt="two")])
    described = {"caption": "three", "task": "other"}
    write_shard(tmp_path / "1.tar", [sample("4", "3", json=described), sample("frame/5", "4", txt="")])
    write_shard(tmp_path / "2.tar", [sample("6", "5", json=described)])
    tasks, problems = read(tmp_path)
    assert list(tasks) == ["frame", "other"] and not problems
    assert captions(tasks["frame"]) == ["one", "two", ""] and captions(tasks["other"]) == ["three"] * 2
    assert_holds(tasks["frame"], "1", "2", "4")
    assert_holds(tasks["other"], "3", "5")
    assert tasks["other"].relative(tasks["other"].pairs[1]) == "2.tar/6.before.png | 2.tar/6.after.png"
    files = [str(tmp_path / f"{number}.tar") for number in range(3)]
    theirs = list(webdataset.WebDataset(files, shardshuffle=False))
    assert [pair.places[0] for pair in tasks["frame"].pairs + tasks["other"].pairs] == [
        f"{theirs[i]['__url__']}/{theirs[i]['__key__']}.before.png" for i in (0, 1, 3, 2, 4)
    ]
    one, problems = read(tmp_path / "0.tar")
    assert captions(one["frame"]) == ["one", "two"] and not problems


def test_bad_shards(tmp_path):
    good = [sample(f"{n}", "1", txt="words") for n in range(3)]
    write_shard(tmp_path / "0.tar", good)
    lacking = {"__key__": "b", "before.png": encoded("before/1"), "txt": "words"}
    silent, broken = sample("c", "1"), sample("d", "1", json=b"{")
    write_shard(tmp_path / "1.tar", [lacking, silent, broken, sample("e", "1", txt=b"\xff")])
    write_shard(tmp_path / "2.tar.gz", good)
    (tmp_path / "2.tar.gz").rename(tmp_path / "2.tar")
    write_shard(tmp_path / "3.tar", good)
    with tarfile.open(tmp_path / "3.tar") as archive:
        end = archive.getmember("2.before.png").offset  # cut off between two files
    (tmp_path / "3.tar").write_bytes((tmp_path / "3.tar").read_bytes()[:end])
    (tmp_path / "4.tar").write_bytes(b"rubbish" * 200)
    tasks, problems = read(tmp_path)
    [task] = tasks.values()
    usable = [task.relative(pair).split(" ")[0] for pair in task.pairs]
    assert usable == [f"{shard}.tar/{n}.before.png" for shard, n in ((0, 0), (0, 1), (0, 2), (3, 0), (3, 1))]
    reasons = {file: reason for _, file, reason in problems}
    for file, words in {
        "1.tar/b": "no .after image",
        "1.tar/c": "no caption",
        "1.tar/d": "texts can't be read",
        "1.tar/e": "texts can't be read",
        "2.tar": "compressed",
        "3.tar": "damaged",
        "4.tar": "damaged",
    }.items():
        assert words in reasons[file], reasons
    (tmp_path / "0.tar").write_bytes(b"")
    with pytest.raises(UserError, match="0.tar"):
        task.pairs[0].read()
    for name in "0123":
        (tmp_path / f"{name}.tar").unlink()
    with pytest.raises(UserError, match="no shard of .* can be read; 1 item"):
        read(tmp_path)


def test_damaged_files_end_in_a_sentence(images):
    """Bytes of tables, shards and data sets changed at random: a UserError of one sentence, or problems, or data."""
    described = {"json": {"task": "t"}, "txt": "words"}
    write_shard(images / "0.tar", [sample(f"{n}", "1", **described) for n in range(3)])
    saved_set = save_dataset(images / "set", ROWS)
    targets = {
        file: file for file in [*(write_table(images, kind, ROWS) for kind in ("jsonl", "parquet")), images / "0.tar"]
    }
    targets |= dict.fromkeys(saved_set.iterdir(), saved_set)
    for file, root in targets.items():
        whole = file.read_bytes()
        for seed in range(25):
            file.write_bytes(mutations.of_bytes(mutations.Random(seed), whole))
            saved._opened.cache_clear()
            problems = Problems()
            try:
                pairs = [pair for task in read_tasks(root, problems) for pair in task.pairs]
            except UserError as error:
                assert "\n" not in str(error).split(" item(s) of ")[0]
                continue
            for pair in pairs:
                for read_part in (pair.read, pair.size):
                    with contextlib.suppress(UserError):
                        read_part()
        file.write_bytes(whole)
