"""The job of Pair Customization: a whole run, broken off and gone on with, its passes against recordings, bad images."""

import jax
import numpy as np
import pytest
from golden import golden_dir
from PIL import Image

from configs import pair as pair_config
from lorweb_jax.adapters import pair
from lorweb_jax.adapters.formats.pair_file import read_member
from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs import pair as pair_job
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.pair_run import members_of_run
from lorweb_jax.training.loop import train

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
    config.unroll, config.train.log_every, config.train.checkpoint_every = 1, 1, 1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """The folder of a whole run of four updates, two of them with a style pass."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert train(config_of(images), workdir, pair_job.make)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
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
    assert sorted(by_width) == [128, 640]


def test_a_run_broken_off_in_either_phase_goes_on_to_the_bit(run, images, tmp_path, monkeypatch, quick_compiles):
    config = config_of(images)
    monkeypatch.setattr(pair_job.PairJob, "log_images", lambda self, model, step: {})
    workdir = run.parent / "broken_off"  # beside the other, whose compiled programs it takes
    real = pair_job.PairBatches.at
    for last in (1, 3):

        def at(self, number, last=last):
            if number == last:
                raise KeyboardInterrupt
            return real(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(pair_job.PairBatches, "at", at)
            with pytest.raises(KeyboardInterrupt):
                train(config, workdir, pair_job.make)
    assert train(config, workdir, pair_job.make)
    assert (workdir / "log.txt").read_bytes() == (run / "log.txt").read_bytes()
    for name in pair.MEMBERS:
        file = f"export/{name}_lora.safetensors"
        assert (workdir / file).read_bytes() == (run / file).read_bytes()


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
        ({"data.content": small, "data.style": small}, "has a side shorter than 32 pixels"),
        ({"data.style": "embedded:lines_pencil"}, "stands for an operation on an embedded drawing, but the content"),
        ({"pair.content_rank": 100, "pair.style_rank": 29}, "100 and 29 need 129 orthonormal rows"),
        ({"pair.double_style": "2"}, r"config\.pair\.double_style names block 2, but there are 2"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            pair_job.make(config_of(images, **changes))
        assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_resized_and_said(images, tmp_path, capsys):
    larger = png(tmp_path / "larger.png", (192, 128))
    job = pair_job.make(config_of(images, **{"data.style": larger}))
    assert [image.shape for image in job.images] == [(64, 96, 3)] * 2
    assert "larger.png is resized from 192x128 to the 96x64 pixels" in capsys.readouterr().out
