"""Aspect buckets: which pairs are in which, batches of one shape, a stream that resumes to the bit."""

import collections
import contextlib
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.analogies import Analogies, Task
from lorweb_jax.data.buckets import divide, nearest, quadrant_shapes
from lorweb_jax.data.loader import AnalogyLoader
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.two_files import TwoFiles
from lorweb_jax.main import read_config
from lorweb_jax.planning.shapes import PlannedBasisJob
from lorweb_jax.precomputed.scope import Scope
from lorweb_jax.settings import config as configs

SQUARE, WIDE, TALL = SHAPES = [(16, 16), (16, 32), (32, 16)]
TASKS = {"a": "sswwtt", "b": "sssww", "c": "ww", "d": "sst", "e": "wt"}  # a task's pairs: square, wide or tall
SIZES = {"s": (20, 22), "w": (17, 40), "t": (60, 28)}  # height, width


def picture(number, size):
    return np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tasks of before/ and after/; every picture has a number of its own."""
    root, number = tmp_path_factory.mktemp("data"), 0
    for task, kinds in TASKS.items():
        for place, kind in enumerate(kinds):
            for side in ("before", "after"):
                file = root / task / side / f"{place}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(number, SIZES[kind])).save(file)
                number += 1
    return root


def take(count, root, batch=2, position=None, **options):
    with contextlib.closing(AnalogyLoader(root, batch, **{"buckets": SHAPES, **options})) as loader:
        if position:
            loader.set_state(position)
        keys = ("condition", "target", "images", "caption", "task", "pairs", "reversed")
        return [{key: np.array(batch[key]) for key in keys} for batch in (next(loader) for _ in range(count))], loader


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_the_nearest_bucket_by_aspect_then_by_area():
    """Against the definition, over sizes drawn at random."""
    shapes = [(64, 64), (64, 128), (128, 64), (256, 256), (96, 64)]
    random = np.random.default_rng(0)
    for height, width in random.integers(8, 2000, (200, 2)).tolist():
        chosen = shapes[nearest((height, width), shapes, range(5))]
        off = {shape: abs(math.log(width / height) - math.log(shape[1] / shape[0])) for shape in shapes}
        assert off[chosen] <= min(off.values()) + 1e-9
        if chosen[0] == chosen[1]:
            square = math.sqrt(height * width)
            assert chosen == ((64, 64) if square < 128 else (256, 256))  # their geometric mean
    assert nearest((10, 20), shapes, [0, 2]) == 0


def test_pairs_by_bucket_and_none_lost(root):
    with contextlib.closing(AnalogyLoader(root, 2, buckets=SHAPES)) as loader:
        groups = [
            (group.name, shape, len(group.pairs))
            for group, shape in zip(loader.bucketed.groups, loader.bucketed.shapes, strict=True)
        ]
        # d's lone tall pair joins its square ones; of e's two, each alone, the first joins the second.
        expected = [("a", SQUARE, 2), ("b", SQUARE, 3), ("d", SQUARE, 3)]
        expected += [("a", WIDE, 2), ("b", WIDE, 2), ("c", WIDE, 2), ("a", TALL, 2), ("e", TALL, 2)]
        assert groups == expected and loader.bucketed.moved == 2
        assert loader.bucketed.shares == [2 / 6, 3 / 5, 1, 2 / 6, 2 / 5, 1, 2 / 6, 1]
        assert "16x16 8, 16x32 6, 32x16 4; 2 of them alone" in loader.bucketed.summary()


def test_batches_of_one_shape_show_each_bucket_by_its_share(root):
    # Analogies: 2 + 6 + 6 square, 2 + 2 + 2 wide, 2 + 2 tall; of 24 batches 14, 6 and 4.
    batches, loader = take(24, root, 2, caption_drop=0)
    shapes = collections.Counter(batch["images"].shape[2:4] for batch in batches)
    assert shapes == {SQUARE: 14, WIDE: 6, TALL: 4}
    pairs = [pair for group in loader.bucketed.groups for pair in group.pairs]
    shown = collections.defaultdict(list)
    for batch in batches:
        height, width = batch["images"].shape[2:4]
        assert batch["condition"].shape == batch["target"].shape == (2, 2 * height, 2 * width, 3)
        for row in range(2):
            first, second = batch["pairs"][row]
            (a, a2), (b, _) = (
                [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in pairs[i].read()]
                for i in (first, second)
            )
            for image, expected in zip(batch["images"][row], (a, a2, b), strict=True):
                assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1  # one or two passes of the filter
            shown[height, width].append((first, second))
    for shape, count in {SQUARE: 14, WIDE: 6, TALL: 4}.items():  # an epoch of each bucket shows each analogy once
        assert len(set(shown[shape][:count])) == count and len(shown[shape]) == 2 * count


def test_the_stream_resumes_to_the_bit_whatever_reads_it(root):
    options = {"reverse_probability": 0.3, "caption_drop": 0.3, "task_balanced": True, "seed": 3}
    straight, _ = take(12, root, 4, **options)
    assert len({batch["images"].shape for batch in straight}) == 3
    start, loader = take(5, root, 4, **options)
    position = json.loads(json.dumps(loader.get_state()))
    rest, _ = take(7, root, 4, position=position, workers=1, **options)
    assert_equal(start + rest, straight)
    for rows in ([0, 3], [1, 2]):
        share, _ = take(7, root, 4, position=position, rows=rows, **options)
        assert_equal(share, [{key: value[rows] for key, value in batch.items()} for batch in straight[5:]])
    other, _ = take(12, root, 4, **options | {"seed": 4})
    assert any((one["pairs"] != two["pairs"]).any() for one, two in zip(straight, other))


def test_balance_counts_a_task_in_several_buckets_once(root):
    batches, _ = take(60, root, 3, task_balanced=True)
    tasks = collections.Counter(name for batch in batches for name in batch["task"].tolist())
    for name in TASKS:
        assert abs(tasks[name] - 36) <= 4  # of 180; a bucket's turn is a whole batch


def test_a_position_of_other_buckets_is_refused(root):
    _, loader = take(1, root)
    position = loader.get_state()
    for options in ({"buckets": SHAPES[:2]}, {"buckets": (), "quadrant_size": 16}):
        with pytest.raises(UserError, match="another stream .*buckets"):
            take(1, root, position=position, **options)
    _, plain = take(1, root, buckets=(), quadrant_size=16)
    with pytest.raises(UserError, match="another stream .*buckets None ->"):
        take(1, root, position=plain.get_state())


def test_images_that_cant_be_read(tmp_path, root):
    """A header that can't be read is reported at once; damage behind it when it is met, and the shape stays."""
    pairs = []
    for number in range(5):
        files = [root / "b" / side / f"{number}.png" for side in ("before", "after")]
        pairs.append(TwoFiles(*map(str, files), ""))
    (tmp_path / "empty.png").write_bytes(b"")
    whole = (root / "b/before/3.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    pairs[0] = TwoFiles(str(tmp_path / "empty.png"), pairs[0].after, "")
    pairs[3] = TwoFiles(str(tmp_path / "cut.png"), pairs[3].after, "")
    problems = Problems()
    bucketed = divide([Task("b", str(root), tuple(pairs))], SHAPES, problems)
    assert [len(group.pairs) for group in bucketed.groups] == [2, 2] and "empty.png is empty" in [*problems][0].reason
    batches, loader = take(8, Analogies([Task("b", str(root), tuple(pairs))]), 1)
    assert {batch["images"].shape[2:4] for batch in batches} == {SQUARE, WIDE}  # wide pairs can't make an analogy
    assert {pair for batch in batches for pair in batch["pairs"].flatten().tolist()} == {0, 1}
    assert loader.problems.substituted == 4 and "damaged" in [*loader.problems][1].reason
    bad = Task("t", str(root), (pairs[0], TwoFiles(str(tmp_path / "gone.png"), pairs[0].after, "")))
    with pytest.raises(UserError, match="no task has two images whose size can be read; 3 item"):
        divide([bad], SHAPES, Problems())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"buckets": [(16, 20)]}, "multiple of 8"),
        ({"buckets": [16]}, "the buckets"),
        ({"buckets": [(16, 16), [16, 16]]}, "are the same"),
        ({"quadrant_size": 16}, "both buckets and a quadrant size"),
        ({"max_size": 64}, "both buckets and a quadrant size"),
    ],
)
def test_bad_buckets(root, options, message):
    with pytest.raises(UserError, match=message):
        take(1, root, **options)


def test_the_configs_field():
    """As a command line gives it, and after json, which has no tuples."""
    program = (
        "import sys; from lorweb_jax.main import read_command_line; "
        "print(dict(read_command_line(sys.argv)[0].data)['buckets'])"
    )
    words = ["--config=configs/basis.py:smoke", "--config.data.buckets=((32, 32), (24, 40))"]
    told = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert told.stdout == "((32, 32), (24, 40))\n", told.stderr
    config = read_config("configs/basis.py:smoke")
    assert quadrant_shapes(config.data) == [(32, 32)]
    config.data.buckets = ((32, 32), (24, 40))
    configs.check(config)
    assert quadrant_shapes(config.data) == [(32, 32), (24, 40)]
    again = json.loads(json.dumps(config.to_dict()))
    assert not configs.differences(config, again) and dict(configs.fields(again))["data.buckets"] == [
        [32, 32],
        [24, 40],
    ]


def test_plan_and_precompute_with_buckets():
    config = read_config("configs/basis.py:smoke")
    config.data.buckets, config.precomputed = ((32, 40), (48, 32)), "folder"
    assert PlannedBasisJob.size.fget(SimpleNamespace(config=config)) == (96, 64)
    scope = Scope.of(config, None, {})
    assert scope.quadrant is None and "config.data.buckets" in scope.queries_kept
    assert scope.left_out == ("text_encoder", "text_encoder_2")  # the image encoder stays
