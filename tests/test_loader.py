"""The analogy loader: what is in a batch, and a stream that depends on data and seed alone."""

import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.loader import AnalogyLoader
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.relation252k import SideBySide

SIDE = 16
KEYS = ("condition", "target", "images", "caption", "task", "pairs", "reversed")


def pixels(pair_id, height=SIDE, width=SIDE):
    """before, after uint8 [2,height,width,3] of a pair: noise that nothing else has."""
    return np.random.default_rng(pair_id).integers(0, 256, (2, height, width, 3), np.uint8)


def write_data(root, *sizes, height=SIDE, width=SIDE):
    """Tasks of `sizes` pairs; pair ids count through."""
    pair_id = 0
    for task, size in enumerate(sizes):
        folder = root / f"t{task}" / "Group1"
        folder.mkdir(parents=True)
        for pair in range(size):
            Image.fromarray(np.concatenate(pixels(pair_id, height, width), 1)).save(folder / f"{pair}.png")
            pair_id += 1
        labels = [{"img_name": f"{pair}.png", "edit_instruction": f"edit {task} {pair}"} for pair in range(size)]
        (folder / "labels.json").write_text(json.dumps(labels))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), 2, 4, 3)  # 2 + 12 + 6 = 20 analogies


def take(count, *args, position=None, **options):
    """The next `count` batches of a loader (from a saved position) and its final position."""
    with contextlib.closing(AnalogyLoader(*args, **{"quadrant_size": SIDE, **options})) as loader:
        if position:
            loader.set_state(position)
        # copies: arrays from workers live in shared memory
        batches = [{key: np.array(batch[key]) for key in KEYS} for batch in (next(loader) for _ in range(count))]
        return batches, loader.get_state()


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_a_batch_pixel_by_pixel(root):
    batches, _ = take(20, root, 4, reverse_probability=0.5, caption_drop=0.0)
    reversals = collections.Counter()
    for batch in batches:
        assert batch["condition"].shape == batch["target"].shape == (4, 2 * SIDE, 2 * SIDE, 3)
        assert batch["images"].shape == (4, 3, SIDE, SIDE, 3)
        assert {batch[key].dtype for key in KEYS[:3]} == {np.dtype(np.uint8)}
        for row in range(4):
            first, second = batch["pairs"][row]
            (a, a2), (b, b2) = pixels(first), pixels(second)
            task, place = (0, first) if first < 2 else (1, first - 2) if first < 6 else (2, first - 6)
            caption = f"edit {task} {place}"
            if batch["reversed"][row]:
                a, a2, b, b2, caption = a2, a, b2, b, ""
            np.testing.assert_array_equal(batch["condition"][row], np.block([[[a], [a2]], [[b], [b]]]))
            np.testing.assert_array_equal(batch["target"][row], np.block([[[a], [a2]], [[b], [b2]]]))
            np.testing.assert_array_equal(batch["images"][row], np.stack([a, a2, b]))
            assert (batch["task"][row], batch["caption"][row]) == (f"t{task}", caption)
            reversals[bool(batch["reversed"][row])] += 1
    assert min(reversals.values()) > 80 * 0.3  # p = 0.5; below 24 of 80 has a chance under 0.001


def test_each_epoch_shows_every_ordered_pair_once_in_its_own_order(root):
    batches, _ = take(20, root, 2)
    pairs = [tuple(pair) for batch in batches for pair in batch["pairs"].tolist()]
    groups = ((0, 1), (2, 3, 4, 5), (6, 7, 8))
    expected = {(i, j) for group in groups for i in group for j in group if i != j}
    assert set(pairs[:20]) == set(pairs[20:]) == expected and len(expected) == 20
    assert pairs[:20] != pairs[20:] and pairs[:20] != sorted(pairs[:20])
    other_seed, _ = take(10, root, 2, seed=1)
    assert [tuple(pair) for batch in other_seed for pair in batch["pairs"].tolist()] != pairs[:20]


def test_workers_leave_the_stream_and_the_position_as_they_are(root):
    options = {"reverse_probability": 0.3, "caption_drop": 0.3, "seed": 5}
    straight, _ = take(12, root, 3, **options)
    start, position = take(5, root, 3, **options)
    position = json.loads(json.dumps(position))
    rest, _ = take(7, root, 3, workers=2, position=position, **options)
    assert_equal(start + rest, straight)
    again, position = take(5, root, 3, workers=2, **options)
    rest, _ = take(7, root, 3, position=position, **options)
    assert_equal(again + rest, straight)


def test_position_in_an_orbax_checkpoint(root, tmp_path):
    straight, _ = take(9, root, 4)
    with contextlib.closing(AnalogyLoader(root, 4, quadrant_size=SIDE)) as loader:
        for _ in range(4):
            next(loader)
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(loader)))
            next(loader)  # what is read after the save isn't in it
    with contextlib.closing(AnalogyLoader(root, 4, quadrant_size=SIDE)) as loader:
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(loader)))
        assert_equal([next(loader) for _ in range(5)], straight[4:])


def test_going_back_in_the_same_loader(root):
    with contextlib.closing(AnalogyLoader(root, 4, quadrant_size=SIDE)) as loader:
        state = loader.get_state()
        first = [next(loader) for _ in range(3)]
        loader.set_state(state)
        assert_equal([next(loader) for _ in range(3)], first)
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_position_of_another_stream_is_refused(root, tmp_path):
    _, position = take(1, root, 4)
    for options in (
        {"seed": 1},
        {"batch_size": 2},
        {"task_balanced": True},
        {"data": write_data(tmp_path / "other", 2, 4)},
    ):
        arguments = {"data": root, "batch_size": 4, "quadrant_size": SIDE, **options}
        with contextlib.closing(AnalogyLoader(**arguments)) as loader:
            with pytest.raises(UserError, match="another stream"):
                loader.set_state(position)


def test_hosts_share_one_stream(root):
    """Whichever rows a host's devices hold, and however many hosts there were when the position was saved."""
    whole, position = take(5, root, 4, reverse_probability=0.3)
    later, _ = take(2, root, 4, reverse_probability=0.3, position=position)
    for split in ([0, 1], [2, 3]), ([0, 3], [1, 2]), ([0], [1], [2], [3]):
        for rows in split:
            share, reached = take(5, root, 4, reverse_probability=0.3, rows=rows, workers=len(rows) % 2)
            assert_equal(share, [{key: batch[key][rows] for key in KEYS} for batch in whole])
            assert reached == position
    share, _ = take(2, root, 4, reverse_probability=0.3, rows=[1, 2], position=position)
    assert_equal(share, [{key: batch[key][[1, 2]] for key in KEYS} for batch in later])


def test_caption_drop_rate(root):
    batches, _ = take(25, root, 80, caption_drop=0.05)
    captions = np.concatenate([batch["caption"] for batch in batches])
    dropped = (captions == "").sum()
    assert 60 <= dropped <= 145  # 2,000 draws at 0.05: 100 expected, 4 standard deviations are 39
    pairs = np.concatenate([batch["pairs"] for batch in batches])
    for pair in np.unique(pairs, axis=0):  # drawn anew each epoch, not fixed to the analogy
        assert (captions[(pairs == pair).all(1)] != "").any()
    everything, _ = take(1, root, 20, caption_drop=1.0)
    assert (everything[0]["caption"] == "").all()


def test_task_balance(root):
    batches, _ = take(12, root, 3, task_balanced=True)  # a batch is one round of the three tasks
    assert all(sorted(batch["task"]) == ["t0", "t1", "t2"] for batch in batches)
    assert len({tuple(batch["task"]) for batch in batches}) > 1
    of_t1 = [tuple(pair) for batch in batches for pair in batch["pairs"].tolist() if 2 <= pair[0] < 6]
    assert len(set(of_t1)) == 12  # t1's 12 analogies, each once
    again, _ = take(6, root, 3, task_balanced=True, position=take(6, root, 3, task_balanced=True)[1])
    assert_equal(again, batches[6:])


def test_quadrants_take_the_first_images_size(tmp_path):
    root = write_data(tmp_path, 2, height=24, width=40)
    batch = take(1, root, 2, quadrant_size=None)[0][0]
    a, b = pixels(batch["pairs"][0, 0], 24, 40), pixels(batch["pairs"][0, 1], 24, 40)
    np.testing.assert_array_equal(batch["target"][0], np.block([[[a[0]], [a[1]]], [[b[0]], [b[1]]]]))
    assert take(1, root, 2, quadrant_size=None, max_size=40)[0][0]["target"].shape == (2, 16, 32, 3)  # 24x40, fitted
    assert take(1, root, 2, quadrant_size=(8, 24))[0][0]["images"].shape == (2, 3, 8, 24, 3)


def test_unequal_grids(tmp_path):
    root = write_data(tmp_path, 2)
    Image.new("RGB", (64, 24)).save(root / "t0" / "Group1" / "0.png")
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"2 sizes \(32x32, 48x64\)"):
            take(1, root, 2, quadrant_size=None, workers=workers)
    assert take(1, root, 2)[0][0]["target"].shape == (2, 32, 32, 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_reported_and_stood_in_for(tmp_path, workers, caplog):
    root = write_data(tmp_path, 2, 4, 3)
    task = root / "t1" / "Group1"
    (task / "1.png").write_bytes((task / "1.png").read_bytes()[:200])
    (task / "2.png").write_bytes(b"")
    Image.new("RGB", (1, 5)).save(root / "t2" / "Group1" / "0.png")
    problems = Problems()
    with contextlib.closing(AnalogyLoader(root, 4, quadrant_size=SIDE, workers=workers, problems=problems)) as loader:
        assert len(problems) == 0  # files are only looked up at first
        batches = [next(loader) for _ in range(5)]
    pairs = [tuple(pair) for batch in batches for pair in batch["pairs"].tolist()]
    usable = {(0, 1), (1, 0), (2, 5), (5, 2), (7, 8), (8, 7)}
    assert set(pairs) == usable
    # An epoch of 20: all but the usable analogies are replaced, each by one of its own task.
    assert problems.substituted == 20 - len(usable)
    tasks = collections.Counter(name for batch in batches for name in batch["task"])
    assert tasks == {"t0": 2, "t1": 12, "t2": 6}
    assert sorted((p.task, p.file) for p in problems) == [
        ("t1", "Group1/1.png"),
        ("t1", "Group1/2.png"),
        ("t2", "Group1/0.png"),
    ]
    assert all(
        sum(problem.file in line and problem.task in line for line in caplog.messages) == 1 for problem in problems
    )


@pytest.mark.parametrize(
    "error",
    [
        KeyError("exif"),
        RecursionError(),
        MemoryError(),
        ZeroDivisionError("x"),
        UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    ],
)
def test_whatever_one_image_raises_the_others_are_read(tmp_path, monkeypatch, error):
    root = write_data(tmp_path, 3)

    def read(pair, tell, whole=SideBySide.read):
        if pair.file.endswith("1.png"):
            raise error
        return whole(pair, tell)

    monkeypatch.setattr(SideBySide, "read", read)
    problems = Problems()
    batches, _ = take(3, root, 2, problems=problems)
    assert {pair for batch in batches for pair in batch["pairs"].flatten().tolist()} == {0, 2}
    [problem] = problems
    assert problem.file == "Group1/1.png" and problem.reason.startswith(type(error).__name__)


def test_what_is_left_out_of_images_is_logged_once(tmp_path, caplog):
    """Stretched to the quadrant's shape, a profile of no use, more than one frame: each told of the first such file."""
    root = write_data(tmp_path, 3, height=SIDE, width=2 * SIDE)
    pictures = [Image.open(file).copy() for file in sorted((root / "t0" / "Group1").glob("*.png"))]
    for number, picture in enumerate(pictures):
        picture.save(
            root / "t0" / "Group1" / f"{number}.png",
            icc_profile=b"rubbish",
            save_all=True,
            append_images=[picture.rotate(180)],
        )
    with contextlib.closing(AnalogyLoader(root, 3, quadrant_size=SIDE, workers=0)) as loader:
        for _ in range(4):
            next(loader)
    told = [message for message in caplog.messages if str(root) in message]
    assert len(told) == 3
    assert {sum(words in line for line in told) for words in ("stretched", "profile", "frames")} == {1}


def test_a_task_that_turned_unreadable_gives_way_to_the_next(tmp_path):
    root = write_data(tmp_path, 2, 3)
    tasks = read_tasks(root, Problems())
    (root / "t0" / "Group1" / "0.png").unlink()
    batches, _ = take(4, Analogies(tasks), 2)
    assert {name for batch in batches for name in batch["task"]} == {"t1"}
    for file in (root / "t1" / "Group1").glob("*.png"):
        file.unlink()
    with pytest.raises(UserError, match="none of the 8 analogies can be read; the first of 4 problems: task t"):
        take(1, Analogies(tasks), 2)


def test_too_small_for_a_quadrant_of_its_own_size(tmp_path):
    root = write_data(tmp_path, 3)
    Image.new("RGB", (14, 16)).save(root / "t0" / "Group1" / "0.png")
    problems = Problems()
    batches, _ = take(3, root, 2, quadrant_size=None, problems=problems)
    assert {pair for batch in batches for pair in batch["pairs"].flatten().tolist()} == {1, 2}
    assert "below 8 pixels" in next(iter(problems)).reason
    assert 0 in {pair for batch in take(3, root, 2)[0] for pair in batch["pairs"].flatten().tolist()}


def test_the_listing_of_bad_data_is_shown(tmp_path, caplog):
    root = write_data(tmp_path, 2, 1)
    with contextlib.closing(AnalogyLoader(root, 1, quadrant_size=SIDE)) as loader:
        assert len(loader.problems) == 1
    assert "t1: labels.json: 1 usable pair" in caplog.text


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch size is 0"),
        ({"batch_size": "4"}, "batch size is '4'"),
        ({"batch_size": True}, "batch size is True"),
        ({"quadrant_size": 20}, "multiple of 8"),
        ({"quadrant_size": (16, 0)}, "multiple of 8"),
        ({"quadrant_size": "16"}, "quadrant size is '16'"),
        ({"max_size": 1.5, "quadrant_size": None}, "largest size is 1.5"),
        ({"caption_drop": None}, "caption drop is None"),
        ({"workers": 10**12}, "workers is 1000000000000"),
        ({"seed": 2**64}, "seed is"),
        ({"max_size": 512}, "both"),
        ({"caption_drop": 1.1}, "caption drop is 1.1"),
        ({"reverse_probability": float("nan")}, "reversal is nan"),
        ({"workers": -1}, "workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"rows": [0, 2]}, "rows .0, 2. of a batch of 2"),
    ],
)
def test_bad_arguments(root, options, message):
    with pytest.raises(UserError, match=message):
        AnalogyLoader(**{"data": root, "batch_size": 2, "quadrant_size": SIDE, **options})


def runs(pid):
    """Whether a process exists and isn't merely waiting to be collected by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks for processes in /proc")
def test_workers_outlive_sigterm_and_end_when_the_program_is_killed(root):
    """More batches than are kept ready come after the SIGTERM; nothing is said on stderr, in the end neither."""
    program = (
        "import multiprocessing, os, signal, sys, time; from lorweb_jax.data.loader import AnalogyLoader\n"
        "if __name__ == '__main__':\n"
        "    loader = AnalogyLoader(sys.argv[1], 2, quadrant_size=16, workers=1); next(loader)\n"
        "    workers = [child.pid for child in multiprocessing.active_children()]\n"
        "    for worker in workers: os.kill(worker, signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
        "    for _ in range(12): next(loader)\n"
        "    print(*workers, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        workers = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
        assert process.stderr.read() == ""
    assert workers
    deadline = time.monotonic() + 20
    while any(map(runs, workers)):
        assert time.monotonic() < deadline, f"workers {workers} outlived their program"
        time.sleep(0.1)
