"""python -m lorweb_jax.evaluate: records, what is resumed and what is refused, figures, the report. No model is run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.spatial import distance

from lorweb_jax import BasisConfig
from lorweb_jax import evaluate as command
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.problems import Problems
from lorweb_jax.evaluation import metrics, routing, scores
from lorweb_jax.evaluation.making import add_scores
from lorweb_jax.evaluation.records import Records
from lorweb_jax.evaluation.samples import read_folder
from lorweb_jax.evaluation.statistics import bootstrap_interval, estimate, paired
from lorweb_jax.evaluation.table import TRUTH
from lorweb_jax.images import svg
from lorweb_jax.pipeline.folder import PARTS
from lorweb_jax.pipeline.pipeline import Pipeline

ROOT = Path(__file__).parents[1]


def image(random, height=32, width=32):
    coarse = random.integers(0, 256, (5, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_task(folder, random, pairs):
    folder.mkdir(parents=True)
    for i in range(pairs):
        before = image(random)
        Image.fromarray(np.concatenate([before, 255 - before], 1)).save(folder / f"{i}.png")
    entries = [{"img_name": f"{i}.png", "edit_instruction": "invert <it>"} for i in range(pairs)]
    (folder / "labels.json").write_text(json.dumps(entries))


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for split in ("seen", "unseen"):
        for task in ("one", "two", "three"):
            write_task(tmp_path / split / task / "Group1", random, 4)
    return tmp_path


class FakeBasis:
    def __init__(self, seed):
        self.config = BasisConfig(size=3)
        self.seed = seed

    def to_arrays(self):
        return {"x": {"a": np.zeros((2, 5))}}

    def fingerprint(self):
        return f"weights {self.seed}"

    def coefficients(self, query):
        q = np.linspace(0.7, 0.3, len(query))
        rows = np.broadcast_to(np.stack([q, 1 - q, 0 * q], 1), (2, len(query), 3))
        return {"blocks.to_q": rows, "blocks.to_v": np.ones((1, len(query), 3)) / 3}


class FakePipeline:
    """A base that answers grey and a basis that inverts, with an error of its own."""

    calls = []
    image_encoder = None
    root = None

    def __init__(self, basis=None):
        self.model = SimpleNamespace(basis=basis)
        self.folder = SimpleNamespace(encoder_folder=None, folder=self.root)

    @classmethod
    def load(cls, folder, image_encoder=None, **options):
        FakePipeline.loaded = options
        return cls()

    def attach(self, path, config=None):
        return FakePipeline(FakeBasis((path if isinstance(path, str) else path.name).count("x")))

    def query(self, conditions):
        return np.zeros((len(conditions), 2))

    coefficients_batch = Pipeline.coefficients_batch

    def _coefficients(self, conditions):
        return self.model.basis.coefficients(self.query(conditions))

    def edit_batch(
        self, conditions, prompts, *, steps, guidance, round_to_bfloat16, seed, use_basis=True, mix=None, strength=1.0
    ):
        FakePipeline.rounded = round_to_bfloat16
        assert len(seed) == len(conditions) == len(prompts)
        if strength != 1:
            return [np.full_like(b, round(100 * strength)) for _, _, b in conditions]
        if mix is not None:  # shades by the first coefficient, so that mixes can be told apart
            assert all(each.basis == self.model.basis.fingerprint() for each in mix)
            return [np.full_like(conditions[0][2], round(200 * each.coefficients["blocks.to_q"][0, 0])) for each in mix]
        FakePipeline.calls.append((steps, tuple(seed), use_basis))
        if not use_basis:
            return [np.full_like(b, 128) for _, _, b in conditions]
        error = 1 + 20 * self.model.basis.seed
        return [
            255 - np.clip(b.astype(int) + s % 5 + error, 0, 255).astype(np.uint8)
            for s, (_, _, b) in zip(seed, conditions)
        ]


@pytest.fixture
def run(data, monkeypatch):
    """The command on fake weights: run(*options) -> results.json."""
    for part in PARTS:
        (data / "base" / part).mkdir(parents=True)
        (data / "base" / part / "config.json").write_text("{}")
    for name in ("ours", "theirs.x"):
        (data / name).mkdir()
    monkeypatch.setattr("lorweb_jax.pipeline.pipeline.Pipeline", FakePipeline)
    monkeypatch.setattr(FakePipeline, "root", data / "base")
    monkeypatch.setattr(FakePipeline, "calls", [])

    def call(*options, methods=("ours", "theirs.x")):
        paths = [re.sub(r"[^:]+$", lambda name: str(data / name[0]), method) for method in methods]
        folders = [f"seen={data}/seen", f"unseen={data}/unseen"]
        command.main(
            [*paths, "--pipeline", "base", "--data", *folders, "--out", f"{data}/out", "--steps", "3", *options]
        )
        return json.loads((data / "out/results.json").read_text())

    return call


def test_figures_are_means_over_tasks_of_what_the_images_say(run, data):
    results = run()
    assert list(results["splits"]) == ["all", "seen", "unseen"]
    assert set(results["splits"]["seen"]["methods"]) == {"ours", "theirs.x", "base, text only", "copy b", TRUTH}
    assert results["splits"]["all"]["triplets"] == 12 and results["splits"]["seen"]["tasks"] == 3
    records = Records(data / "out")
    samples, by_task = records.samples(), {}
    for key, record in records.method("ours").read().items():
        made = np.asarray(Image.open(data / "out/methods/ours" / f"{key}.png")) / 255
        error = np.mean((made - samples[key].b2 / 255) ** 2)
        assert record["scores"]["mse"] == pytest.approx(error, rel=1e-9)
        assert record["scores"]["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-9)
        by_task.setdefault((samples[key].split, samples[key].task), []).append(error)
    means = {task: np.mean(errors) for task, errors in by_task.items()}
    seen = [value for (split, _), value in means.items() if split == "seen"]
    shown = results["splits"]["seen"]["methods"]["ours"]["mse"]
    assert shown["mean"] == pytest.approx(np.mean(seen), rel=1e-9)
    assert shown["interval_95"][0] <= shown["mean"] <= shown["interval_95"][1]
    assert results["per_task"]["seen/one"]["ours"]["mse"] == pytest.approx(means["seen", "one"], rel=1e-9)
    [pair] = [
        each
        for each in results["splits"]["all"]["paired"]
        if (each["score"], each["method"], each["against"]) == ("mse", "ours", "theirs.x")
    ]
    assert pair["mean"] < 0 and pair["tasks_won"] == 1 and pair["tasks"] == 6 and pair["interval_95"][1] < 0
    assert results["splits"]["all"]["methods"][TRUTH]["lpips"]["mean"] < 1e-9
    assert results["splits"]["all"]["methods"]["copy b"]["alexnet_directional"]["mean"] == 0
    direction = {name: of["alexnet_directional"]["mean"] for name, of in results["splits"]["all"]["methods"].items()}
    assert direction["ours"] == pytest.approx(direction[TRUTH], abs=0.05) and direction["ours"] < direction["copy b"]
    assert results["cost"]["ours"]["parameters"] == 10 and results["cost"]["ours"]["peak_bytes"] > 2**20
    assert "| ours " in (data / "out/results.md").read_text()


def assert_same(x, y):
    """Equal results; LPIPS in batches of another size differs in the last bits of float32."""
    if isinstance(x, dict):
        assert x.keys() == y.keys()
        x, y = list(x.values()), list(y.values())
    if isinstance(x, list):
        for one, other in zip(x, y, strict=True):
            assert_same(one, other)
    else:
        assert x == (y if x is None or isinstance(x, str) else pytest.approx(y, abs=1e-6))


def test_nothing_is_made_twice_and_noise_is_of_the_triplet(run, data):
    first = run()
    assert (
        len({seed for _, seeds, _ in FakePipeline.calls for seed in seeds}) == 6
    )  # both splits name their files alike
    before = {path: path.stat().st_mtime_ns for path in (data / "out/methods").rglob("*.*")}
    FakePipeline.calls.clear()
    assert run("--batch", "2") == first and not FakePipeline.calls
    assert before == {path: path.stat().st_mtime_ns for path in (data / "out/methods").rglob("*.*")}
    # Stopped in the middle: an image without its record, and a record without its image.
    kept = sorted((data / "out/methods/ours").glob("*.png"))
    kept[0].with_suffix(".json").unlink()
    kept[1].unlink()
    again = run("--batch", "3")
    assert [len(seeds) for _, seeds, _ in FakePipeline.calls] == [2]
    assert_same(again["splits"], first["splits"])


def test_parts_make_the_same_as_one_process(run, data):
    first = run()
    (data / "out").rename(data / "whole")
    for number in (2, 1):
        with pytest.raises(FileNotFoundError):
            run("--part", f"{number}/2")
    assert not (data / "out/report.html").exists()
    command.main(["--out", str(data / "out")])
    results = json.loads((data / "out/results.json").read_text())
    assert_same(results["splits"], first["splits"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["--steps", "4"], "steps was 3 and is 4"),
        (["--seed", "1"], "seed was 0 and is 1"),
        (["--max-size", "48"], "max_size was None and is 48.*12 triplets have another size"),
        (["--dtype", "bfloat16"], "dtype was float32 and is bfloat16"),
        (["--quantization", "fp8"], "quantization was the default and is fp8"),
        (["--round-to-bfloat16"], "round_to_bfloat16 was the default and is True"),
        (["--per-task", "3"], "6 triplets are not in it"),
        (["--per-task", "1"], "6 of its triplets are not asked for"),
    ],
)
def test_records_of_another_evaluation_are_refused(run, data, options, message):
    run("--scores", "mse", methods=["ours"])
    FakePipeline.calls.clear()
    with pytest.raises(UserError, match=message):
        run(*options)
    assert not FakePipeline.calls


def test_where_and_how_it_is_computed_reaches_the_pipeline(run, data):
    """What changes no figure needs no other folder: an evaluation on one device goes on on four."""
    run("--scores", "mse", methods=["ours"])
    run("--scores", "mse", "--mesh", "data=4", "--attention", "xla", "--unstacked", "--offload", "blocks")
    expected = {"mesh": {"data": 4}, "attention": "xla", "unstacked": True, "offload": "blocks"}
    assert FakePipeline.loaded == {"dtype": "float32", "quantization": "none"} | expected
    assert FakePipeline.rounded is False


def test_rounding_reaches_the_sampling(run):
    run("--scores", "mse", "--round-to-bfloat16", methods=["ours"])
    assert FakePipeline.rounded is True


def test_other_weights_images_and_folders_are_refused(run, data):
    run("--scores", "mse", methods=["ours"])
    with pytest.raises(UserError, match="'ours' .* made with other weights .weights 0, and weights 1 now"):
        command.main(
            [f"ours={data}/theirs.x", "--pipeline", "base", "--data", f"seen={data}/seen", f"unseen={data}/unseen"]
            + ["--out", f"{data}/out", "--steps", "3"]
        )
    damaged = next((data / "out/methods/ours").glob("*.png"))
    Image.new("RGB", (32, 32)).save(damaged)
    with pytest.raises(UserError, match="is not the image that was scored; delete it"):
        run()
    damaged.unlink()
    run("--scores", "mse")
    (data / "out").rename(data / "earlier")
    run("--seed", "9", "--scores", "mse", methods=["ours"])
    with pytest.raises(UserError, match="can't be compared: seed was 9 and is 0"):
        command.main(["--out", str(data / "out"), "--also", str(data / "earlier")])


def test_two_folders_of_one_setup_are_compared(run, data):
    run("--scores", "mse", methods=["ours"])
    (data / "out").rename(data / "earlier")
    run("--scores", "mse", "--without-references", methods=["theirs.x"])
    command.main(["--out", str(data / "out"), "--also", str(data / "earlier")])
    assert {"ours", "theirs.x"} <= set(json.loads((data / "out/results.json").read_text())["splits"]["all"]["methods"])


def test_a_method_without_all_its_images_is_left_out_and_named(run, data):
    run("--scores", "mse")
    next((data / "out/methods/theirs.x").glob("*.png")).unlink()
    command.main(["--out", str(data / "out")])
    results = json.loads((data / "out/results.json").read_text())
    assert results["incomplete"] == {"theirs.x": 11} and "theirs.x" not in results["cost"]
    assert "theirs.x has only 11 of its images" in (data / "out/report.html").read_text()


class Page(HTMLParser):
    """Attributes and texts of a page; every element that is opened is closed."""

    VOID = {"meta", "img", "line", "circle"}

    def __init__(self, text):
        super().__init__()
        self.open, self.urls, self.texts, self.counts = [], [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.urls += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_report_is_one_page_that_asks_nothing_of_the_network(run, data):
    run()
    text = (data / "out/report.html").read_text()
    page = Page(text)
    words = " ".join(page.texts)
    assert page.urls and all(url.startswith("data:image/") for url in page.urls)
    assert "http" not in text.replace("http-equiv", "") and "@import" not in text and "url(" not in text
    assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text and "<script" not in text
    # Two splits, two methods, best, median and worst: a, a′, b, three results, the truth; paths of mixes.
    assert page.counts["img"] == 2 * 2 * 3 * 7 + 2 * 8
    for word in ("ours: best", "theirs.x: worst", "“invert <it>”", "Router of ours", "Cost", "unseen/two"):
        assert word in words
    # Of each split a scatter; of each method members by task and by layer, 12 analogies on a plane, 3 pairs of tasks.
    assert page.counts["svg"] == 3 + 2 * 4 and page.counts["circle"] == 3 * 5 + 2 * (12 + 3)
    assert page.counts["rect"] == 2 * (3 * 3 + 3 * 3)
    assert len(text) < 1_000_000


def write_triplet(folder, random, names, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in names.items():
        Image.fromarray(picture).save(folder / f"{name}{suffix}")


def test_folders_by_category_and_instruction(tmp_path):
    random = np.random.default_rng(1)
    a, a2, b, b2 = (image(random, 32, 48) for _ in range(4))
    write_triplet(tmp_path / "style/make_it_red/01", random, {"a": a, "a2": a2, "b": b, "b2": b2})
    write_triplet(tmp_path / "style/make_it_red", random, {"02_a": a, "02_a_prime": a2, "02_b": image(random, 64, 96)})
    write_triplet(tmp_path / "style/blue", random, {"a": a, "a'": a2, "b": b})
    (tmp_path / "style/blue/instruction.txt").write_text("paint it blue\n")
    write_triplet(tmp_path / "style/blue/9", random, {"a": a, "b": b})
    write_triplet(tmp_path / "style/bad", random, {"a": a, "a2": a2, "b": b, "b2": b2})
    (tmp_path / "style/bad/a2.png").write_bytes(b"no image")
    write_triplet(tmp_path / "style/no_truth", random, {"a": a, "a2": a2, "b": b})
    (tmp_path / "style/no_truth/b2.png").write_bytes(b"no image")
    problems = Problems()
    samples = {(s.task, s.key): s for s in read_folder(tmp_path, 5, problems, split="new")}
    assert [task for task, _ in samples] == ["style/blue", "style/make_it_red", "style/make_it_red", "style/no_truth"]
    one, two = (
        samples["style/make_it_red", "style/make_it_red 01"],
        samples["style/make_it_red", "style/make_it_red 02"],
    )
    np.testing.assert_array_equal(one.b2, b2)
    np.testing.assert_array_equal(two.a2, a2)
    assert one.caption == "make it red" and one.split == "new" and one.id != two.id
    assert two.b.shape == two.a.shape and two.b2 is None
    assert samples["style/blue", "style/blue ."].caption == "paint it blue"
    told = {(p.task, p.file): p.reason for p in problems}
    assert told["style/blue", "9"] == "has no image a2" and "not an image" in told["style/bad", "."]
    assert "without a truth" in told["style/no_truth", "."] and told["style/bad", ""].startswith("no usable triplet")
    (tmp_path / "empty/x/y").mkdir(parents=True)
    with pytest.raises(UserError, match="no usable task in the data folder"):
        read_folder(tmp_path / "empty", 5, Problems())
    write_triplet(tmp_path / "empty/x/y", random, {"a": a, "a2": a2})
    with pytest.raises(UserError, match="no triplet in the data folder .* can be read; expected"):
        read_folder(tmp_path / "empty", 5, Problems())


def test_without_a_truth_scores_of_the_truth_are_absent(run, data):
    import shutil

    random = np.random.default_rng(2)
    shutil.rmtree(data / "unseen")
    for name in ("one", "two"):
        write_triplet(data / "unseen/kind" / name, random, {key: image(random) for key in ("a", "a2", "b")})
    results = run()
    unseen = results["splits"]["unseen"]
    assert set(unseen["methods"]["ours"]) == {"lpips_b", "alexnet_directional"} and unseen["methods"][TRUTH] == {}
    assert results["splits"]["seen"]["methods"]["ours"]["mse"]["mean"] > 0
    assert results["skipped"] == 2
    assert "no image b2" in (data / "out/report.html").read_text()


def test_a_score_of_ones_own(run, data):
    (data / "mine.py").write_text(
        "from lorweb_jax.evaluation.scores import Score\n"
        "def colour(channel):\n"
        "    c = int(channel)\n"
        "    return Score('colour', 'Colour', lambda samples, images: [image[..., c].mean() for image in images])\n"
        "def wrong(): return Score('wrong', 'Wrong', lambda samples, images: [float('nan')] * len(images))\n"
        "def number(): return 1\n"
        "def none(): return Score('none', 'None', lambda samples, images: None)\n"
    )
    (data / "broken.py").write_text("1 / 0")
    results = run("--add-score", f"{data}/mine.py:colour=1", "--scores", "colour", "mse", methods=["ours"])
    assert results["splits"]["all"]["methods"]["base, text only"]["colour"]["mean"] == 128
    # A score that comes later is computed from the images that are there.
    FakePipeline.calls.clear()
    assert "lpips" in run("--scores", "lpips", methods=["ours"])["splits"]["all"]["methods"]["ours"]
    assert not FakePipeline.calls
    for spec, message in (
        (f"{data}/mine.py:gone", "has no function gone"),
        (f"{data}/mine.py:number", "returned a int; expected .*Score"),
        (f"{data}/absent.py:colour", "can't be loaded"),
        (f"{data}/broken.py:colour", "can't be loaded .ZeroDivisionError: division by zero"),
        (f"{data}/mine.py:colour", "can't be called .*argument: 'channel'.; give .*mine.py:colour=ARGUMENT"),
        (f"{data}/mine.py:number=1", "can't be called .*too many positional arguments.; give .*mine.py:number alone"),
        ("colour", "no FILE.py:FUNCTION"),
    ):
        with pytest.raises(UserError, match=message):
            run("--add-score", spec)
    with pytest.raises(UserError, match="wrong gave .nan, .* for 12 images; expected one finite number an image"):
        run("--add-score", f"{data}/mine.py:wrong", methods=["ours"])
    with pytest.raises(UserError, match="none gave None for 12 images; expected one finite number an image"):
        run("--add-score", f"{data}/mine.py:none", methods=["ours"])
    assert not {"wrong", "none"} & json.loads((data / "out/scores.json").read_text()).keys()
    with pytest.raises(UserError, match="there is no score beauty; there are mse"):
        run("--scores", "beauty")


class Linear:
    """An encoder that a test can compute: pixels times a matrix."""

    def __init__(self):
        self.matrix = np.random.default_rng(3).normal(size=(3 * 32 * 32, 7))

    def embed(self, images):
        return np.stack([image.reshape(-1) @ self.matrix for image in images]).astype(np.float32)


def test_embedding_scores_are_the_formulas_in_float64(run, data):
    samples = read_folder(data / "seen", 2, Problems())
    made = [255 - s.b // 2 for s in samples]
    direction, distance = scores.embedding_scores("e", "E", Linear())
    e = lambda x: Linear().embed([x])[0].astype(np.float64)
    cosine = lambda x, y: x @ y / np.sqrt((x @ x) * (y @ y))
    expected = [cosine(e(s.a2) - e(s.a), e(m) - e(s.b)) for s, m in zip(samples, made)]
    np.testing.assert_allclose(direction(samples, made), expected, atol=1e-6)
    np.testing.assert_allclose(
        distance(samples, made), [1 - cosine(e(s.b2), e(m)) for s, m in zip(samples, made)], atol=1e-6
    )


def test_figures_of_two_encoders_are_not_mixed(run, data):
    run("--scores", "mse", methods=["ours"])
    records = Records(data / "out")
    samples = records.samples()
    by = lambda source: scores.embedding_scores("clip", "CLIP", Linear(), source)[1:]
    add_scores(records.method("ours"), samples, by("one"))
    add_scores(records.method("ours"), samples, by("one"))
    with pytest.raises(UserError, match="clip_distance of 'ours' was computed with other weights .one, and two now"):
        add_scores(records.method("ours"), samples, by("two"))


def test_intervals_are_scipys():
    x = np.random.default_rng(4).normal(size=23)
    result = stats.bootstrap(
        (x,), np.mean, confidence_level=0.95, n_resamples=5000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    # Both ends have a Monte-Carlo error of about 0.01 with 5,000 resamples; with the same draws they are the same.
    np.testing.assert_allclose(bootstrap_interval(x), result, atol=0.03)
    for wins, trials in ((0, 5), (3, 10), (540, 540)):
        exact = stats.binomtest(wins, trials).proportion_ci(0.68, "wilson")
        np.testing.assert_allclose(metrics.wilson_interval(wins, trials), exact, atol=1e-12)
    with pytest.raises(ValueError, match="two or more"):
        bootstrap_interval([1.0])
    assert estimate({"x": 2.0}) == (2.0, None) and estimate({}) is None
    result = paired({"x": 1.0, "y": 2.0, "z": 9.0}, {"x": 2.0, "y": 2.0}, lower=True)
    assert result.difference.mean == -0.5 and result.tasks_won == 0.75 and result.tasks == 2
    assert paired({"x": 1.0}, {"x": 2.0}, lower=False).tasks_won == 0


def test_routing_counts_members():
    np.testing.assert_allclose(routing.shares([[0.5, -0.5, 0], [0, 0, 0]]), [[0.5, 0.5, 0], [1 / 3] * 3])
    np.testing.assert_allclose(
        routing.effective_members(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]])), [4, 1, 2]
    )


def test_routing_by_layer_and_task():
    """Counts in effect, unused members, distances and the map, each against scipy or the definition in float64."""
    random = np.random.default_rng(0)
    c = {"one": random.normal(size=(12, 2, 5)), "two": random.normal(size=(12, 1, 5))}
    c["one"][..., 3] = c["two"][..., 3] = 1e-3  # of no use to any layer
    c["one"][:, 1, 0] = 0  # of no use to one layer
    tasks = ["x", "y", "z", "x"] * 3
    found = routing.routing_of({path: array.astype(np.float32) for path, array in c.items()}, tasks)
    assert [(layer.path, layer.block, layer.dead) for layer in found.layers] == [
        ("one", 0, 1),
        ("one", 1, 2),
        ("two", 0, 1),
    ]
    share = np.abs(c["one"][:, 1]) / np.abs(c["one"][:, 1]).sum(-1, keepdims=True)
    of_task = [np.exp(stats.entropy(share[[i for i, t in enumerate(tasks) if t == task]].mean(0))) for task in "xyz"]
    expected = np.exp(stats.entropy(share, axis=-1)).mean(), np.mean(of_task), np.exp(stats.entropy(share.mean(0)))
    np.testing.assert_allclose(found.layers[1].effective, expected, rtol=1e-5)
    np.testing.assert_allclose(found.effective("one"), np.mean([each.effective for each in found.layers[:2]], axis=0))
    assert found.dead == [3] and found.members == 5
    points = np.concatenate([c["one"].reshape(12, -1), c["two"].reshape(12, -1)], 1) / np.sqrt(3)
    means = [points[[i for i, t in enumerate(tasks) if t == task]].mean(0) for task in "xyz"]
    np.testing.assert_allclose(found.distances, distance.cdist(means, means), atol=1e-6)
    # Distances on the map are those of the doubly centred squares' two largest eigenvalues (classical scaling).
    squares = distance.cdist(points, points, "sqeuclidean")
    centre = np.eye(12) - 1 / 12
    values, vectors = np.linalg.eigh(-0.5 * centre @ squares @ centre)
    scaled = vectors[:, -2:] * np.sqrt(values[-2:])
    np.testing.assert_allclose(distance.pdist(found.place), distance.pdist(scaled), atol=1e-5)
    assert found.explained == pytest.approx(values[-2:].sum() / values.sum(), rel=1e-5)


def test_rank_correlation_and_distances_of_edits():
    random = np.random.default_rng(1)
    x, y = random.integers(0, 6, 40), random.normal(size=40)
    assert routing.rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert routing.rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    directions = random.normal(size=(6, 4))
    means = [directions[i::3].mean(0) for i in range(3)]
    found = routing.edit_distances(directions, ["b", "a", "c"] * 2, ["c", "b", "a"])
    means = [means[2], *means[:2]]
    np.testing.assert_allclose(found, distance.cdist(means, means, "cosine"), atol=1e-12)


def test_the_report_shows_a_router(run, data):
    """A map of analogies with a mark each, a dot for every two tasks, and the path from one mix to the farthest."""
    run("--scores", "mse")
    folder = data / "out" / "methods" / "ours"
    page = (data / "out" / "report.html").read_text()
    ids = np.load(folder / "coefficients.npz")["ids"]
    assert page.count("<circle cx") >= len(ids) + 15 and "Spearman" in page and "Every layer" in page
    strip = np.asarray(Image.open(folder / "path.png"))
    assert strip.shape == (32, 8 * 32, 3)
    # The fake's first coefficient falls by place: the last split's first analogy against the farthest one, the first.
    shades = strip[0, 32::32, 0].astype(int)
    row = ids.tolist().index(
        next(key for key in ids if key.startswith("one") and list(ids).index(key) >= len(ids) // 2)
    )
    own, far = (round(200 * q) for q in (np.linspace(0.7, 0.3, len(ids))[row], 0.7))
    assert shades[0] == pytest.approx(own, abs=1) and shades[-1] == pytest.approx(far, abs=1)
    np.testing.assert_allclose(np.diff(shades), (far - own) / 6, atol=1.01)
    directions = np.load(data / "out" / "edits.npz")
    assert directions["directions"].shape == (len(ids), 1152)


@pytest.mark.parametrize("low, high", [(0.1, 0.9), (-3, 4000), (0.5, 0.5), (0, 0), (1e-9, 2e-9)])
def test_ticks_span_what_is_drawn(low, high):
    marks = svg.ticks(low, high)
    steps = np.diff(marks)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        (["gone"], "there is no gone"),
        ([".", "=x"], "'=x' is no NAME=PATH"),
        ([".", "style:runs/pair:strong"], "ends in 'strong', which is no strength"),
        *(
            ([".", name, value], f"{name} is {value}; give ")
            for name, value in (
                ("--per-task", "0"),
                ("--per-task", "10000000"),
                ("--steps", "0"),
                ("--steps", "1001"),
                ("--max-size", "8"),
                ("--batch", "-1"),
                ("--batch", "100000"),
                ("--guidance", "nan"),
                ("--guidance", "inf"),
                ("--guidance", "-1.0"),
                ("--seed", "-1"),
                ("--seed", str(2**64)),
            )
        ),
        ([".", "--part", "3/2"], "'3/2' is no part"),
        ([".", "--steps", "many"], "argument --steps: invalid int value: 'many'; see --help"),
    ],
)
def test_bad_command_lines(options, message):
    with pytest.raises(UserError, match=message) as caught:
        command.main([*options, "--pipeline", "base", "--data", "nowhere"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "neither methods nor --out"),
        (["."], "--data was not given"),
        ([".", "--data", "d"], "--pipeline was not given"),
        ([".", "--pipeline", "p", "--data", "a/x", "b/x"], "two data folders are of one split, x, x"),
        (["--out", "{}"], "holds no setup.json, so no evaluation"),
        (["--out", "{}", "--steps", "7"], "--steps is of making images, and no methods were given"),
        (["--out", "{}", "--add-score", "x.py:y"], "--add-score is of making images, and no methods were given"),
        (
            [".", "--pipeline", "p", "--data", "d", "--part", "1/2", "--also", "x"],
            "--also is of the report, which --part",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        command.main([option.format(tmp_path) for option in options])


def test_results_of_another_program_are_not_replaced(run, data):
    (data / "out").mkdir()
    (data / "out" / "report.html").write_text("mine")
    with pytest.raises(UserError, match="report.html exists already"):
        run()
    assert (data / "out" / "report.html").read_text() == "mine" and not FakePipeline.calls


def test_bad_data_is_told_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="can't be listed"):
        command.main([str(tmp_path), "--pipeline", "nowhere", "--data", str(tmp_path / "gone")])
    with pytest.raises(SystemExit):
        command.main(["--help"])


def test_help_names_no_machine(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert not re.search(r"/(work|home|tmp)/", capsys.readouterr().out)


def test_dino_is_transformers(run, data):
    """A tiny DINOv2 with random weights: the distance is what torch's cosine says of its class tokens."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(data / "dino")
    processor = transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(data / "dino")
    tool = f"{ROOT}/tools/transformers_scores.py:dino={data}/dino"
    results = run("--add-score", tool, "--scores", "dino_distance", methods=["ours"])
    records = Records(data / "out")
    samples = records.samples()
    for key, record in records.method("ours").read().items():
        made = np.asarray(Image.open(data / "out/methods/ours" / f"{key}.png"))
        pixels = processor(images=[made, samples[key].b2], return_tensors="pt")
        with torch.no_grad():
            one, other = model(**pixels).last_hidden_state[:, 0].double()
        cosine = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
        assert record["scores"]["dino_distance"] == pytest.approx(1 - cosine, abs=1e-5)
    assert results["scores"]["dino_distance"]["source"]
    with pytest.raises(UserError, match="holds no image model that transformers reads"):
        run("--add-score", f"{ROOT}/tools/transformers_scores.py:dino={data}/seen")


def test_a_pipeline_as_it_is(tmp_path, quick_compiles):
    """On a recorded tiny pipeline: each record is what `edit` makes of the triplet with its seed."""
    from golden import golden_dir

    from lorweb_jax import Pipeline

    random = np.random.default_rng(5)
    write_task(tmp_path / "data/one/Group1", random, 2)
    basis, style = golden_dir() / "basis_a.safetensors", golden_dir() / "pair" / "style_a.safetensors"
    options = ["--pipeline", f"{golden_dir()}/tiny_pipeline", "--data", f"{tmp_path}/data", "--out", f"{tmp_path}/out"]
    command.main([f"ours={basis}", f"style:{style}:2", *options, "--steps", "2", "--scores", "mse", "clip_directional"])
    records = Records(tmp_path / "out")
    kinds = {method.name: method.about["kind"] for method in records.methods()}
    assert kinds == {"ours": "basis", "style_a": "style", "base, text only": "base", "copy b": "copy", TRUTH: "truth"}
    pipeline = Pipeline.load(golden_dir() / "tiny_pipeline").attach(basis)
    # The other way round: neither the order nor what stands beside a sample matters.
    samples = read_folder(tmp_path / "data", 2, Problems(), split="data")[::-1]
    made = {
        name: np.stack([np.asarray(Image.open(records.method(name).folder / f"{s.id}.png")) for s in samples])
        for name in kinds
    }
    conditions, captions = [s.condition for s in samples], [s.caption for s in samples]
    there = records.method("ours").read()
    sampling = dict(steps=2, guidance=2.5, seed=[there[s.id]["seed"] for s in samples])
    np.testing.assert_array_equal(made["ours"], pipeline.edit_batch(conditions, captions, **sampling))
    styles = [pipeline.style(style, 2.0)]
    styled = pipeline.edit_batch(conditions, captions, use_basis=False, styles=styles, true_guidance=1.0, **sampling)
    np.testing.assert_array_equal(made["style_a"], styled)
    assert not np.array_equal(made["style_a"], made["base, text only"])
    with np.load(records.method("ours").folder / "coefficients.npz") as stored:
        row = stored["ids"].tolist().index(samples[0].id)
        for path, c in pipeline.coefficients(*conditions[0]).coefficients.items():
            np.testing.assert_allclose(stored[path][row], c, atol=1e-5)


def test_strength_and_several_pairs(run, data):
    """Two words before a path: the basis at a strength, and by the mean over a task's pairs."""
    run("--scores", "mse", "--without-references", methods=["strength:0.5:ours", "pairs:ours"])
    for name, shade in (("ours_strength_0.5", 50), ("ours_several_pairs", 100)):  # the fake's mean is 0.5
        images = list((data / "out" / "methods").glob(f"{name}-*/*.png"))
        assert len(images) == 12 and all((np.asarray(Image.open(path)) == shade).all() for path in images)
