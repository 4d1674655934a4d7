"""Data sets as ArrayRecord by tensorflow-datasets: what is written, what reads it, and what is damaged or absent."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.loader import AnalogyLoader
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.store import main
from lorweb_jax.data.stored import parse_name
from lorweb_jax.evaluation.samples import read_folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(folder, name) of a Relation252K folder with one damaged image and what was stored of it."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for task, count in (("frame", 3), ("flip", 3)):
        group = folder / "plain" / task / "Group1"
        group.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (16, 32 + 4 * i, 3), np.uint8)).save(group / f"{i}.png")
        labels = [{"img_name": f"{i}.png", "edit_instruction": f"{task} it, №{i}"} for i in range(count)]
        (group / "labels.json").write_text(json.dumps(labels))
    (folder / "plain/flip/Group1/1.png").write_bytes(b"rubbish")
    main([str(folder / "plain"), "--name", "small", "--out", str(folder / "tfds")])
    return folder / "plain", f"tfds:small:{folder / 'tfds'}"


def test_rows_are_the_folders_pairs(stored):
    plain, stored = (read_tasks(root, Problems()) for root in stored)
    assert [task.name for task in plain] == [task.name for task in stored] == ["flip", "frame"]
    for one, other in zip(plain, stored):
        intact = [pair for pair in one.pairs if "flip/Group1/1.png" not in pair.places[0]]
        assert len(intact) == len(other.pairs) == (2 if one.name == "flip" else 3)
        for pair, row in zip(intact, pickle.loads(pickle.dumps(other.pairs))):
            assert (pair.instruction, pair.size()) == (row.instruction, row.size()) and row.changed() > 0
            for image, copy in zip(pair.read(), row.read()):
                np.testing.assert_array_equal(image, copy)
    assert len({pair.places for task in stored for pair in task.pairs}) == 5


def test_other_readers_read_it(stored):
    """tensorflow-datasets itself gives the images and texts; the format is ArrayRecord."""
    import sys

    import tensorflow_datasets as tfds

    name, folder = stored[1].split(":", 2)[1:]
    source = tfds.data_source(name, split="train", data_dir=folder, download=False)
    rows = [pair for task in read_tasks(stored[1], Problems()) for pair in task.pairs]
    assert len(source) == len(rows) == 5
    for row in rows:
        record = source[row.row]
        np.testing.assert_array_equal(record["before"], row.read()[0])
        np.testing.assert_array_equal(record["after"], row.read()[1])
        assert record["caption"].decode() == row.instruction
    assert "array_record" in "".join(path.name for path in (stored[0].parent / "tfds").rglob("*"))
    assert "tensorflow" not in sys.modules


def test_it_serves_training_and_evaluation(stored):
    """grain's loader and the evaluation get the same analogies as from the folder's intact pairs."""
    loader = AnalogyLoader(Analogies(read_tasks(stored[1], Problems())), 2, quadrant_size=16, seed=0)
    batch = next(iter(loader))
    assert batch["target"].shape[0] == 2
    by_caption = lambda samples: {(each.caption, each.b.tobytes()): each.b2 for each in samples}
    there, stored_ones = (by_caption(read_folder(root, 20, Problems())) for root in stored)
    assert len(stored_ones) == 2 + 6 and stored_ones.keys() == there.keys()
    for key, truth in stored_ones.items():
        np.testing.assert_array_equal(truth, there[key])


def test_what_is_refused(stored, tmp_path, capsys):
    plain, name = stored
    with pytest.raises(UserError, match="is there already"):
        main([str(plain), "--name", "small", "--out", str(plain.parent / "tfds")])
    with pytest.raises(UserError, match="no data set's name"):
        main([str(plain), "--name", "My data", "--out", str(tmp_path)])
    for root in ("tfds:large:" + name.split(":", 2)[2], f"tfds:small:{tmp_path}", "tfds:"):
        with pytest.raises(UserError, match="can't be read|names no data set"):
            read_tasks(root, Problems())
    main([str(plain), "--name", "again", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "wrote 5 pairs" in said and "flip: Group1/1.png" in said
    [file] = tmp_path.rglob("*array_record*-of-*")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="store"):
        [pair.read() for task in read_tasks(f"tfds:again:{tmp_path}", Problems()) for pair in task.pairs]
    [metadata] = (tmp_path / "again").rglob("metadata.json")
    metadata.write_text("{}")
    from lorweb_jax.data import stored as module

    module._opened.cache_clear()
    with pytest.raises(UserError, match="list of its captions"):
        read_tasks(f"tfds:again:{tmp_path}", Problems())


@pytest.mark.parametrize("folder", ["gs://bucket/tfds", "local_data/tfds", "/data/tfds"])
def test_a_bucket_keeps_its_two_slashes(folder):
    """Roots pass through Path, which would make one of them."""
    assert parse_name(str(Path(f"tfds:small:{folder}"))) == ("small", folder)
    assert parse_name(f"tfds:small:{folder}") == ("small", folder)
