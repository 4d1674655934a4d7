"""The job of Pair Customization: a whole run, broken off and gone on with, its passes as recorded, bad images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import golden_dir
from PIL import Image

from configs import pair as pair_config
from lorweb_jax.adapters import pair
from lorweb_jax.adapters.formats.pair_file import read_member
from lorweb_jax.common.errors import UserError
from lorweb_jax.flow.loss import add_noise
from lorweb_jax.jobs import pair as pair_job
from lorweb_jax.models.flux1.packing import unpack
from lorweb_jax.nn import sharding
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.pair_run import members_of_run, parse
from lorweb_jax.training import loop
from lorweb_jax.training.loop import train
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import Partition, new_state
from lorweb_jax.training.step import TrainStep, active, make_update
from parity.folder import RecordedModels
from parity.pair import names
from parity.pair.training import start

SMALL = golden_dir().parents[1] / "assets" / "small_kontext"
LAYERS = PipelineFolder(SMALL).backbone.adapted


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Paths of a content image and its stylised version."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    content = np.kron(rng.integers(0, 256, (4, 6, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    for name, image in (("content", content), ("style", 255 - content)):
        Image.fromarray(image).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in ("content", "style")}


def config_of(images, **changes):
    config = pair_config.smoke()
    config.pipeline = str(SMALL)
    config.data.update(images, long_edge=96)
    config.unroll = config.train.accumulate = config.train.log_every = config.train.checkpoint_every = 1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def trained(images):
    """train(workdir) by one job and one set of compiled programs, which all runs share."""
    job, steps = pair_job.make(config_of(images)), []

    def compiled(*arguments):
        if not steps:
            steps.append(TrainStep(*arguments))
        return steps[0]

    def run(workdir):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "TrainStep", compiled)
            jax.config.update("jax_disable_most_optimizations", True)
            try:
                return train(job.config, workdir, lambda config: job)
            finally:
                jax.config.update("jax_disable_most_optimizations", False)

    return run


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    """The folder of a whole run of four updates, two of them with a style pass."""
    workdir = tmp_path_factory.mktemp("run")
    assert trained(workdir)
    return workdir


def test_a_run_leaves_pictures_and_both_adapters(run):
    assert {path.name for path in (run / "pictures").iterdir()} == {"pair_000004.png", "prompts_000004.png"}
    lines = [line.split() for line in (run / "log.txt").read_text().splitlines()]
    assert ["style/loss" in line for line in lines] == [False, False, True, True]
    trained = members_of_run(run, LAYERS)
    for name in pair.MEMBERS:
        exported = read_member(run / "export" / f"{name}_lora.safetensors", LAYERS)
        assert exported.rank == 2 and exported.blocks == trained[name].blocks and len(exported.blocks) == 12
        for path in exported.a:
            np.testing.assert_array_equal(exported.a[path], trained[name].a[path])
            np.testing.assert_array_equal(exported.b[path], trained[name].b[path])
            assert np.abs(exported.b[path]).max() > 0


def test_content_and_style_stay_orthogonal(run):
    """|ΔW_content ΔW_styleᵀ| of every layer after training, relative to the product of their norms: 1e-5. And A's are
    the same in all layers of one width."""
    content, style = (members_of_run(run, LAYERS)[name] for name in pair.MEMBERS)
    by_width = {}
    for path in content.a:
        for block in content.blocks[path]:
            updates = [
                member.b[path][block].T.astype(np.float64) @ member.a[path][block] for member in (content, style)
            ]
            product = np.linalg.norm(updates[0] @ updates[1].T)
            assert product <= 1e-5 * np.prod([np.linalg.norm(update) for update in updates]), path
            rows = np.concatenate([content.a[path][block], style.a[path][block]])
            np.testing.assert_array_equal(by_width.setdefault(rows.shape[1], rows), rows)
    assert sorted(by_width) == [160, 5 * 160]  # the small base: 4 heads of 40, and what proj_out joins


def test_a_run_broken_off_in_either_phase_goes_on_to_the_bit(run, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pair_job.PairJob, "log_images", lambda self, model, step: {})
    real = pair_job.PairBatches.at
    for last in (1, 3):

        def at(self, number, last=last):
            if number == last:
                raise KeyboardInterrupt
            return real(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(pair_job.PairBatches, "at", at)
            with pytest.raises(KeyboardInterrupt):
                trained(tmp_path)
    assert trained(tmp_path)
    assert (tmp_path / "log.txt").read_bytes() == (run / "log.txt").read_bytes()
    for name in pair.MEMBERS:
        file = f"export/{name}_lora.safetensors"
        assert (tmp_path / file).read_bytes() == (run / file).read_bytes()


# The step against recordings of the published training (method.md §7)


class RecordedRun:
    """The job's own updates from the recorded start, with the recorded draws in the place of the job's."""

    def __init__(self, folder, name, tmp_path, monkeypatch):
        self.data = dict(np.load(folder / f"train_{name}.npz"))
        self.case = json.loads((folder / "cases.json").read_text())["train"][name]
        for which in pair.MEMBERS:
            Image.fromarray(self.data[f"{which}_image"]).save(tmp_path / f"{which}.png")
        config = pair_config.default()
        config.pipeline = str(golden_dir() / "tiny_pipeline")
        config.data.content, config.data.style = (str(tmp_path / f"{which}.png") for which in pair.MEMBERS)
        config.unroll, config.train.batch, config.guidance = 1, 1, self.case["guidance"]
        config.pair.content_rank = config.pair.style_rank = self.case["rank"]
        config.pair.style_start = self.case["style_start_update"]
        for kind in ("double", "single"):
            for which in pair.MEMBERS:
                config.pair[f"{kind}_{which}"] = ",".join(map(str, self.case[f"{kind}_{which}"]))
        config.optimizer.b1, config.optimizer.b2 = self.case["betas"]
        config.optimizer.learning_rate, config.optimizer.weight_decay = self.case["learning_rate"], 0.01
        self.job, self.optimizer = pair_job.make(config), make_optimizer(config)
        self.partition = Partition.of(self.job, config.seed)
        mesh = sharding.make_mesh(config.mesh)

        models = RecordedModels(golden_dir() / "tiny_pipeline")
        arrays = start(self.data, self.case, models).parameters()
        own = self.partition.trainable_shapes(mesh) | self.partition.constant_shapes(mesh)
        own = {path: arrays[parse(path)][...] for path in own}
        self.state = new_state(
            self.job,
            self.partition,
            self.optimizer,
            config,
            {path: own[path] for path in self.partition.trainable},
            {path: own[path] for path in self.partition.constants},
        )
        shapes = self.partition.frozen_shapes(mesh, "float32")
        self.frozen = self.job.folder.read({path: shapes[path] for path in shapes if path not in ("text", "pooled")})
        for field, key in (("text", "encoder_hidden_states"), ("pooled", "pooled_projections")):
            self.frozen[field] = jnp.concatenate([self.data[f"{which}/{key}"] for which in pair.MEMBERS])
        self.draws = None
        monkeypatch.setattr(pair_job, "draw", lambda key, shape, times: self.draws)
        self.updates = {}

    def _images(self, key):
        """[1, 2, h, w, c] of what is recorded for each image as [1, c, h, w]."""
        return jnp.stack([self.data[f"{which}/{key}"] for which in pair.MEMBERS], axis=1).transpose(0, 1, 3, 4, 2)

    def step(self, number):
        """The metrics of an update."""
        vae, names = self.job.folder.vae_config, active(self.job, number)
        mean, log_variance = self._images("vae_mean"), self._images("vae_logvar")
        batch = {
            "mean": (mean - vae.shift_factor) * vae.scaling_factor,
            "deviation": jnp.exp(0.5 * log_variance) * vae.scaling_factor,
        }
        posterior = [
            self.data.get(f"it{number}/{which}_posterior_eps", self.data[f"it{number}/content_posterior_eps"])
            for which in pair.MEMBERS
        ]
        draws = pair_job.Draws(
            jnp.asarray(self.data[f"it{number}/t"]).reshape(1),
            unpack(jnp.asarray(self.data[f"it{number}/noise"]), *mean.shape[2:4]),
            jnp.stack(posterior).transpose(0, 1, 3, 4, 2),
        )
        if names not in self.updates:
            update = make_update(self.job, self.partition, self.optimizer, self.job.config, names)

            def with_draws(state, frozen, batch, draws):
                self.draws = draws
                return update(state, frozen, batch)

            self.updates[names] = jax.jit(with_draws)
        self.state, metrics = self.updates[names](self.state, self.frozen, batch, draws)
        return metrics

    def check(self, number, metrics):
        """Losses and norms to 1e-5; parameters after the update to 0.02 of a step, as root mean square of a layer.
        Returns how many layers are recorded."""
        compared = 0
        model = self.partition.model(self.state.exported, self.frozen)
        for which in model.basis.names:
            key = f"it{number}/{which}"
            if f"{key}/loss" not in self.data:
                assert f"{which}/loss" not in metrics
                continue
            assert float(metrics[f"{which}/loss"]) == pytest.approx(float(self.data[f"{key}/loss"]), rel=1e-5)
            norm = float(self.data[f"{key}/grad_norm"])
            assert float(metrics[f"{which}/gradient_norm"]) == pytest.approx(norm, rel=1e-5)
            member = model.basis.member(which)
            for name, theirs in self.data.items():
                if name.startswith(f"{key}/after/"):
                    ours = names.read(member, names.parse(name.removeprefix(f"{key}/after/")))
                    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.02 * self.case["learning_rate"], name
                    compared += 1
        return compared


def test_updates_are_the_recorded_ones(tmp_path, monkeypatch, quick_compiles):
    run = RecordedRun(golden_dir() / "pair", "b", tmp_path, monkeypatch)
    for number in range(run.case["updates"]):
        assert run.check(number, run.step(number))


def test_a_fresh_pair_leaves_the_base_unchanged_to_the_bit(images, quick_compiles):
    job = pair_job.make(config_of(images))
    partition = Partition.of(job, 0)
    mesh = sharding.make_mesh(job.config.mesh)
    shapes = partition.frozen_shapes(mesh, "float32")
    rng = np.random.default_rng(0)
    frozen = job.folder.read({path: shapes[path] for path in shapes if path not in ("text", "pooled")})
    frozen |= {name: rng.standard_normal(shapes[name].shape).astype(np.float32) for name in ("text", "pooled")}
    own = partition.trainable_shapes(mesh) | partition.constant_shapes(mesh)
    initial = job.initial(own)
    assert initial.keys() == partition.constants.keys()  # the A's; B's are built as zeros
    own = {path: initial.get(path, np.zeros(shape.shape, np.float32)) for path, shape in own.items()}
    x0, noise = (rng.standard_normal((2, 24, 64)).astype(np.float32) for _ in range(2))
    time = jnp.array([0.3, 0.9])

    @jax.jit
    def velocities(own, frozen):
        model = partition.model(own, frozen)
        text, pooled = (jnp.repeat(said[...][1:], 2, axis=0) for said in (model.text, model.pooled))
        base = model.velocity(add_noise(x0, noise, time), None, text, pooled, time, jnp.ones(2), (64, 96))
        return base, model.pass_velocity("style", x0, noise, time, 1.0, (64, 96))

    np.testing.assert_array_equal(*velocities(own, frozen))


def test_batches_are_draws_of_their_number(images):
    """Both images alike in each example, one ratio for a batch; another number, other draws; the images as they are
    where augmentation is off."""
    job = pair_job.make(config_of(images, **{"data.augment": True, "train.batch": 3}))
    batches = job.data(job.config)
    first, second = (next(batches)["images"] for _ in range(2))
    assert first.shape[:2] == (3, 2) and first.dtype == np.float32 and np.abs(first).max() <= 1
    np.testing.assert_array_equal(batches.at(0)["images"], first)
    assert first.shape != second.shape or not np.array_equal(first, second)
    # The style image is the content image's negative, also after crops and flips.
    np.testing.assert_allclose(first[:, 1], -first[:, 0], atol=1e-5)
    assert not np.array_equal(first[0], first[1])
    shapes = {batches.at(number)["images"].shape[2:4] for number in range(20)}
    assert shapes == {(32, 96), (64, 96), (96, 96)}  # 16:9, as it is and 4:3, 1:1
    assert not job.joint and pair_job.make(config_of(images, **{"pair.joint": True})).joint
    plain = pair_job.make(config_of(images)).data(config_of(images))
    np.testing.assert_array_equal(next(plain)["images"], next(plain)["images"])


def png(path, size=(48, 32), **options):
    Image.new("RGB", size, "red").save(path, **options)
    return str(path)


def test_bad_images_and_captions_are_one_sentence_each(images, tmp_path):
    """Before any weights are read."""
    (tmp_path / "text.png").write_text("no image")
    wide, small = png(tmp_path / "wide.png", (96, 32)), png(tmp_path / "narrow.png", (320, 20))
    for changes, told in (
        ({"data.content": "nowhere.png"}, "there is no image nowhere.png"),
        ({"data.style": str(tmp_path / "text.png")}, "text.png is not an image in a known format"),
        ({"data.style": wide}, "wide.png is 96x32 and .*content.png is 96x64, which differ in aspect"),
        ({"data.condition": wide}, "differ in aspect"),
        ({"data.style": images["content"]}, "are the same picture, from which no style can be learned"),
        ({"data.content": small, "data.style": small}, "has a side shorter than 32 pixels"),
        (
            {"data.augment": True, "data.long_edge": 48},
            "of the ratios that .*augment draws, 16:9 fails: .*shorter than",
        ),
        ({"data.style": "embedded:lines_pencil"}, "stands for an operation on an embedded drawing, but the content"),
        ({"pair.content_rank": 130, "pair.style_rank": 31}, "130 and 31 need 161 orthonormal rows"),
        ({"pair.double_style": "2"}, r"config\.pair\.double_style names block 2, but there are 2"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            pair_job.make(config_of(images, **changes))
        assert "\n" not in str(caught.value)


def test_a_run_without_a_style_says_so(images, capsys):
    said = "the style on no block, so that this run learns the content alone"
    assert (
        pair_job.make(config_of(images)).members.names == ("content", "style") and said not in capsys.readouterr().out
    )
    without = {"pair.double_style": "none", "pair.single_style": "none"}
    assert pair_job.make(config_of(images, **without)).members.names == ("content",)
    assert said in capsys.readouterr().out


def test_an_image_of_another_size_is_resized_and_said(images, tmp_path, capsys):
    larger = png(tmp_path / "larger.png", (192, 128))
    job = pair_job.make(config_of(images, **{"data.style": larger}))
    assert [image.shape for image in job.images] == [(64, 96, 3)] * 2
    assert "larger.png is resized from 192x128 to the 96x64 pixels" in capsys.readouterr().out
