"""What is precomputed equals what the training step computes; it is made once, survives kills, and is refused when
it belongs to something else."""

import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from configs import basis as basis_config
from lorweb_jax.common.errors import UserError
from lorweb_jax.files import store as stores
from lorweb_jax.files.safetensors_io import write
from lorweb_jax.files.state import build, shapes
from lorweb_jax.files.store import Store
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.pipeline.pipeline import Pipeline
from lorweb_jax.precomputed.fill import precompute

ROOT = Path(__file__).parents[1]
PIPELINE = ROOT / "assets" / "small_kontext"
TASKS, PAIRS = 2, 3


def write_data(root, seed=0):
    """Tasks of pairs "before | after", 24 to 40 pixels high: every image has to be resized."""
    random = np.random.default_rng(seed)
    for task in range(TASKS):
        folder = root / f"t{task}" / "Group1"
        folder.mkdir(parents=True)
        for pair in range(PAIRS):
            image = random.integers(0, 256, (24 + 8 * pair, 80, 3), np.uint8)
            Image.fromarray(image).save(folder / f"{pair}.png")
        (folder / "labels.json").write_text(
            json.dumps(
                [{"img_name": f"{pair}.png", "edit_instruction": f"put a frame {seed}{task}"} for pair in range(PAIRS)]
            )
        )
    return root


def config_of(data, cache, **basis):
    config = basis_config.smoke()
    config.pipeline, config.data.root, config.precomputed = str(PIPELINE), str(data), str(cache)
    config.data.reverse_probability, config.data.caption_drop, config.train.batch = 0.5, 0.3, 8
    config.unroll, config.unstacked = 1, False
    config.basis.update(basis)
    return config


def job_of(config, **changes):
    with config.unlocked():
        changed = config.copy_and_resolve_references()
        changed.update(changes)
    return BasisJob(changed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, its config, and the folder that was precomputed for it."""
    folder = tmp_path_factory.mktemp("precomputed")
    config = config_of(write_data(folder / "data"), folder / "cache")
    precompute(config)
    return config


def model_of(job):
    """The job's model with its frozen weights and a basis that changes something."""

    def make():
        return job.build(nnx.Rngs(0))

    wanted = shapes(make)
    random = np.random.default_rng(0)
    trained = {
        path: 0.1 * random.standard_normal(shape.shape, np.float32)
        for path, shape in wanted.items()
        if path.startswith("basis.")
    }
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    frozen = {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)
        for path, shape in wanted.items()
        if path not in trained
    }
    return build(make, trained | job.frozen(frozen))


@pytest.fixture(scope="module")
def both(made):
    """(job, model) with precomputed embeddings, and with encoders."""
    jobs = job_of(made), job_of(made, precomputed="")
    return [(job, model_of(job)) for job in jobs]


def loss_of(job, model, batch):
    prepared = {name: np.asarray(value) for name, value in job.prepare(batch).items()}
    return float(
        nnx.jit(lambda model, batch, key: job.loss(model, batch | job.encode(model, batch), key))(
            model, prepared, jax.random.key(0)
        )[0]
    )


def test_loss_without_encoders_is_the_same(both):
    (cached, small), (job, whole) = both
    assert small.text_encoder is small.text_encoder_2 is small.image_encoder is None
    batch = next(job.data(job.config))
    assert batch["reversed"].any() and "" in batch["caption"]
    np.testing.assert_allclose(loss_of(cached, small, batch), loss_of(job, whole, batch), rtol=1e-5)


def test_pictures_without_encoders_ask_for_the_same(both):
    (cached, small), (job, whole) = both
    batch = next(job.data(job.config))
    conditions, prompts = [tuple(images) for images in batch["images"][:2]], list(batch["caption"][:2])
    ours, theirs = Pipeline(cached.folder, small, cached.precomputed), Pipeline(job.folder, whole)
    # Images of other sizes than training's, and results, are shown to the encoder itself.
    larger = [tuple(np.repeat(np.repeat(image, 2, 0), 2, 1) for image in images) for images in conditions]
    for ask in (
        lambda p: p.prompt(prompts)[0],
        lambda p: p.prompt(prompts)[1],
        lambda p: p.query(conditions),
        lambda p: p.query(larger),
        lambda p: p.image_encoder.embed(list(conditions[0])),
    ):
        expected = np.asarray(ask(theirs))
        assert np.abs(ask(ours) - expected).max() <= 1e-6 * np.abs(expected).max()
    assert len(ours.edit_batch(conditions, prompts, steps=1)) == 2


@pytest.mark.parametrize("mode", ["cat-aa'b", "ca'-ca+cb", "cat-paa'b3"])
def test_queries_equal_the_steps(made, tmp_path, mode):
    """Images that were embedded one by one, against the mode's query of the whole condition grid."""
    config = config_of(made.data.root, tmp_path / "cache", query_mode=mode)
    precompute(config)
    cached, job = job_of(config), job_of(config, precomputed="")
    batch = next(job.data(config))
    encoder = cached.precomputed.image_encoder
    expected = encoder.query(mode, list(batch["condition"]))
    found = cached.prepare(batch)["query"]
    assert found.shape == expected.shape == (8, encoder.query_dim(mode))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_whole_grids_stay_with_the_encoder(made, tmp_path, capsys):
    config = config_of(made.data.root, tmp_path / "cache", query_mode="caa'b")
    precompute(config)
    assert "caa'b looks at whole grids" in capsys.readouterr().out and not (tmp_path / "cache" / "images").exists()
    job = job_of(config)
    model = nnx.eval_shape(lambda: job.build(nnx.Rngs(0)))
    assert model.text_encoder_2 is None and model.image_encoder is not None
    assert "views" in job.prepare(next(job.data(config))) and job.prepare(next(job.data(config)))["text"].ndim == 3


def test_what_belongs_to_something_else_is_refused(made, tmp_path):
    def refused(message, **changes):
        with pytest.raises(UserError, match=message):
            job = job_of(made, **changes)
            job.data(job.config)

    refused(r"quadrant_size was \[32, 32\] and is \[64, 64\]", data={"quadrant_size": 64})
    refused("compute_dtype was 'float32' and is 'bfloat16'", compute_dtype="bfloat16")
    refused("holds nothing precomputed", precomputed=str(tmp_path / "none"))
    other = shutil.copytree(PIPELINE, tmp_path / "pipeline", ignore=shutil.ignore_patterns("transformer"))
    (other / "transformer").symlink_to(PIPELINE / "transformer")
    weights = other / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    refused("text_encoder_2 was '.*' and is '.*'; remove that folder or name another", pipeline=str(other))
    refused(
        "lacks 2 of the data's captions, 'put a frame 10' first",
        data={"root": str(write_data(tmp_path / "other", seed=1))},
    )


def test_new_and_changed_files(made, tmp_path):
    """Files that came later are added; one that changed is never taken for what it was."""
    data = Path(shutil.copytree(made.data.root, tmp_path / "data"))
    config = config_of(data, shutil.copytree(made.precomputed, tmp_path / "cache"))
    labels = data / "t1" / "Group1" / "labels.json"
    entries = json.loads(labels.read_text())
    Image.new("RGB", (64, 32)).save(labels.parent / "new.png")
    labels.write_text(json.dumps([*entries, {"img_name": "new.png", "edit_instruction": "put a frame 00"}]))
    with pytest.raises(UserError, match="lacks 1 of the data's image files, train/t1/Group1/new.png"):
        _ = job_of(config).precomputed
    before = set((tmp_path / "cache" / "images").glob("*.safetensors"))
    precompute(config)
    assert before < set((tmp_path / "cache" / "images").glob("*.safetensors"))

    for file in (data / "t0" / "Group1").glob("*.png"):  # as long as before, with another picture in it
        pixels = 255 - np.asarray(Image.open(file))
        size = file.stat().st_size
        Image.fromarray(pixels).save(file)
        file.write_bytes(file.read_bytes().ljust(size, b"\0")[:size])
    job = job_of(config)
    with pytest.raises(UserError, match="an image of task t0 is not in .*images"):
        for _ in range(8):
            job.prepare(next(job.data(config)))
    precompute(config)
    job = job_of(config)
    job.prepare(next(job.data(config)))


# Fills a store as `precompute` does, 5 items a second, and says which it made.
SLOW = """
import sys, time
import numpy as np
from lorweb_jax.files.store import Store
from lorweb_jax.precomputed.fill import fill
def compute(items):
    time.sleep(0.1)
    print(*items, flush=True)
    return items, {"x": np.array([[float(item)] for item in items], np.float32)}
fill(Store(sys.argv[1], {"made": "by test"}, create=True), [str(i) for i in range(60)], 2, 4, "items", lambda: compute)
"""


def start(folder):
    return subprocess.Popen([sys.executable, "-c", SLOW, str(folder)], stdout=subprocess.PIPE, text=True)


def test_processes_share_the_work_and_a_killed_one_holds_nothing_up(tmp_path):
    def shards():
        return [file for file in tmp_path.glob("*.safetensors") if not file.name.startswith(".")]

    first = start(tmp_path)
    while len(shards()) < 5:
        time.sleep(0.02)
    first.kill()
    first.wait()
    (tmp_path / ".0123.host-1.safetensors.partial").write_bytes(b"half")  # as a kill while writing leaves it
    kept = {file: file.stat().st_mtime_ns for file in shards()}
    assert 5 <= len(kept) < 30

    others = start(tmp_path), start(tmp_path)
    printed = [process.communicate(timeout=60)[0].splitlines() for process in others]
    assert [process.returncode for process in others] == [0, 0]
    assert all(lines[-1] == "items: all 60 are there" for lines in printed)
    made = [item for lines in printed for line in lines if not line.startswith("items:") for item in line.split()]
    assert len(made) == len(set(made)) == 60 - 2 * len(kept)  # nothing twice, nothing that was there
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    store = Store(tmp_path, {"made": "by test"})
    items = [str(i) for i in range(60)]
    assert store.settled == set(items)
    np.testing.assert_array_equal(store.gather("x", items)[:, 0], np.arange(60))


def test_a_full_disk_leaves_nothing_that_counts(tmp_path, monkeypatch):
    store = Store(tmp_path, {}, create=True)
    with pytest.raises(UserError, match="GB free, but what is missing there takes 1000000.00 GB"):
        store.require_space(10**15)

    def full(path, arrays, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores, "write", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        store.add("shard", ["item"], ["key"], {"x": np.zeros((1, 2))})
    assert not list(tmp_path.glob("*.safetensors")) and not Store(tmp_path, {}).settled


@pytest.mark.parametrize(
    "keys, items, rows",
    [
        ("{}", "[]", 2),
        ('["a", 1]', "[]", 2),
        ('["a"]', "[]", 2),
        ('["a", "b"]', '"x"', 2),
        ("[", "[]", 2),
        ("[" * 10**5, "[]", 2),
        ('["a", "b", "c"]', "[]", 2),
        ('["a", "b"]', "[]", None),
        ('["a", "b"]', "[null]", 2),
    ],
)
def test_a_shard_that_lies_is_told(tmp_path, keys, items, rows):
    """Lists of other lengths or kinds than the arrays have rows, or arrays of another width than the other shards'."""
    store = Store(tmp_path, {"made_by": "x"}, create=True)
    store.add("0", ["item"], ["k", "l"], {"embedding": np.ones((2, 3), np.float32)})
    assert store.gather("embedding", ["l", "k"]).shape == (2, 3)
    array = np.ones((2, 4) if rows is None else (rows, 3), np.float32)
    write(tmp_path / "1.safetensors", {"embedding": array}, {"keys": keys, "items": items})
    with pytest.raises(UserError, match="1.safetensors is damaged; delete it"):
        Store(tmp_path, {"made_by": "x"})
