"""Saved mixes, strength, several example pairs, adaptation, fits of b: files read by the safetensors package, pictures
by the algebra of mixes, from Python and from the commands; what is refused."""

import contextlib
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from golden import golden_dir

from lorweb_jax import Mix, Pipeline, UserError, edit, read_image, write_image
from lorweb_jax.adapters.formats.lora_file import layer_name, mixed_factors
from lorweb_jax.adapters.formats.mix_file import read_mix, write_mix
from lorweb_jax.export import main as export
from lorweb_jax.images.fit import placement
from lorweb_jax.pipeline.saving import arrays_of

PIPELINE, BASIS = golden_dir() / "tiny_pipeline", golden_dir() / "basis_a.safetensors"
FAST = {"steps": 1, "folded": False}


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module", autouse=True)
def read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "load", functools.cache(Pipeline.load))
        patch.setattr(Pipeline, "attach", functools.cache(Pipeline.attach))
        yield


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(PIPELINE).attach(BASIS)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two pairs and a b, of one size."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    images = {name: random.integers(0, 256, (32, 32, 3), np.uint8) for name in ("a", "a2", "c", "c2", "b")}
    for name, image in images.items():
        write_image(folder / f"{name}.png", image)
    return folder, images


@pytest.fixture(scope="module")
def mixes(pipeline, pictures):
    _, images = pictures
    return [pipeline.coefficients(images[a], images[a2], images["b"]) for a, a2 in (("a", "a2"), ("c", "c2"))]


@pytest.fixture
def saved(pipeline, mixes, tmp_path):
    pipeline.save_mix(tmp_path / "first.safetensors", mixes[0], prompt="é", pictures=[("a.png", "a2.png")])
    pipeline.save_mix(tmp_path / "second.safetensors", mixes[1])
    return tmp_path


def same(mix, other, tolerance=0.0):
    assert mix.basis == other.basis and mix.coefficients.keys() == other.coefficients.keys()
    for path, c in mix.coefficients.items():
        np.testing.assert_allclose(c, other.coefficients[path], rtol=0, atol=tolerance)


def command(pictures, folder, *more, a=("a",), a2=("a2",), out="out.png"):
    source, _ = pictures
    names = [[str(source / f"{name}.png") for name in each] for each in (a, a2, ("b",))]
    edit.main(
        ["--pipeline", str(PIPELINE), "--basis", str(BASIS), "--a", *names[0], "--a2", *names[1], "--b", *names[2]]
        + ["--steps", "1", "--apply", "low-rank", *more, *(["--out", str(folder / out)] if out else [])]
    )


def test_the_file(pipeline, mixes, saved):
    """Another reader sees the coefficients and the header; ours gives back the same numbers and words."""
    with safetensors.safe_open(saved / "first.safetensors", "np") as file:
        header = file.metadata()
    assert header["basis"] == pipeline.model.basis.fingerprint() and header["prompt"] == "é"
    assert json.loads(header["pictures"]) == [["a.png", "a2.png"]]
    for path, c in safetensors.numpy.load_file(saved / "first.safetensors").items():
        np.testing.assert_array_equal(c, mixes[0].coefficients[path])
    mix, prompt, names = pipeline.load_mix(saved / "first.safetensors")
    same(mix, mixes[0])
    assert (prompt, names) == ("é", (("a.png", "a2.png"),))
    assert read_mix(saved / "second.safetensors")[1:] == ("", ())


def test_strength_multiplies_the_update(pipeline, pictures, mixes):
    """As the mix multiplied; that a mix of zeros is the base stands in test_pipeline.py."""
    _, images = pictures
    analogy = images["a"], images["a2"], images["b"]
    half = pipeline.edit(*analogy, strength=0.5, **FAST)
    np.testing.assert_array_equal(half, pipeline.edit(*analogy, mix=0.5 * mixes[0], **FAST))
    np.testing.assert_array_equal(half, pipeline.edit(*analogy, mix=mixes[0], strength=0.5, **FAST))
    assert not np.array_equal(half, pipeline.edit(*analogy, **FAST))
    with pytest.raises(UserError, match="strength multiplies coefficients, and here there are none"):
        pipeline.edit_batch([analogy], [""], use_basis=False, strength=2)
    with pytest.raises(UserError, match="strength is nan"):
        pipeline.edit(*analogy, strength=float("nan"))


def test_several_pairs_are_their_mean(pipeline, pictures, mixes):
    """The coefficients to rounding, and the picture, of one analogy and of two at once."""
    _, images = pictures
    a, a2, c, c2, b = (images[name] for name in ("a", "a2", "c", "c2", "b"))
    mean = pipeline.coefficients(a, a2, b, more_pairs=[(c, c2)])
    same(mean, 0.5 * (mixes[0] + mixes[1]), 1e-6)
    same(pipeline.coefficients_batch([(c, c2, b), (a, a2, a)], more_pairs=[(a, a2)])[0], mean, 1e-6)
    one = pipeline.edit(a, a2, b, more_pairs=[(c, c2)], **FAST)
    np.testing.assert_array_equal(one, pipeline.edit(a, a2, b, mix=mean, **FAST))
    for pairs, said in (([a], "further pair 0 is no pair"), ([(a, 3)], "a2 of further pair 0"), (5, "further pairs")):
        with pytest.raises(UserError, match=said):
            pipeline.edit(a, a2, b, more_pairs=pairs)
    with pytest.raises(UserError, match="a mix was given; leave out either"):
        pipeline.edit(a, a2, b, more_pairs=[(c, c2)], mix=mean)


def test_the_commands(pipeline, pictures, mixes, saved):
    """Save, blend and subtract by edit; the LoRA of the same blend by export, against its dense update."""
    folder, images = pictures
    analogy = images["a"], images["a2"], images["b"]
    first, second = saved / "first.safetensors", saved / "second.safetensors"
    blend = saved / "blend.safetensors"
    command(pictures, saved, "--mix", f"{first}:2", f"{second}:-0.5", "--at", "0.25", "--save-mix", str(blend))
    expected = 1.5 * mixes[0] - 0.125 * mixes[1]
    same(pipeline.load_mix(blend).mix, expected, 1e-6)
    np.testing.assert_array_equal(read_image(saved / "out.png"), pipeline.edit(*analogy, mix=expected, **FAST))
    both = saved / "both.safetensors"
    command(
        pictures, saved, "--save-mix", str(both), "--prompt", "go", "--strength", "3", a="ac", a2=("a2", "c2"), out=None
    )
    kept = pipeline.load_mix(both)
    same(kept.mix, 1.5 * (mixes[0] + mixes[1]), 1e-5)
    assert kept[1:] == ("go", (("a.png", "a2.png"), ("c.png", "c2.png")))
    export(
        ["lora", str(BASIS), str(saved / "lora.safetensors"), "--pipeline", str(PIPELINE), "--strength", "-2"]
        + ["--mix", str(first), f"{second}:0.5"]
    )
    wanted = mixed_factors(arrays_of(pipeline.model.basis), (-2 * mixes[0] - mixes[1]).coefficients)
    tensors = safetensors.numpy.load_file(saved / "lora.safetensors")
    down, up = (tensors[f"transformer.transformer_blocks.1.attn.to_q.lora_{side}.weight"] for side in "AB")
    path = next(path for path in wanted if layer_name(path, 1) == "transformer_blocks.1.attn.to_q")
    update = wanted[path].a[1] @ wanted[path].b[1]
    np.testing.assert_allclose((up @ down).T, update, atol=1e-6 * np.abs(update).max())


def test_adaptation(pipeline, pictures, mixes, saved, capsys):
    """The command fits the mix that edits, then the strength counts; the first step of Adam moves coefficients by the
    rate. That steps follow the loss's gradient stands in test_probes.py."""
    _, images = pictures
    a, a2, b = (images[name] for name in ("a", "a2", "b"))
    kept = saved / "adapted.safetensors"
    options = ["--adapt", "1", "--prompt", "go", "--strength", "2", "--save-mix", str(kept)]
    command(pictures, saved, *options, out=None)
    assert "coefficients adapted to the pair: 1 steps in" in capsys.readouterr().out
    moved = pipeline.adapt(a, a2, b, "go", steps=1)
    same(pipeline.load_mix(kept).mix, 2 * moved, 1e-6)
    onwards = pipeline.adapt(a, a2, b, "go", steps=1, rate=0.01, seed=3, mix=moved)
    for before, after, rate in ((mixes[0], moved, 0.02), (moved, onwards, 0.01)):
        # rate·g / (|g| + 1e-8): the whole rate but for the least gradients.
        step = np.concatenate([(c - before.coefficients[path]).ravel() for path, c in after.coefficients.items()])
        np.testing.assert_allclose([np.median(np.abs(step)), np.abs(step).max()], rate, rtol=1e-3)
    for option, said in (({"steps": 0}, "steps is 0"), ({"rate": 0}, "rate is 0"), ({"seed": -1}, "seed is -1")):
        with pytest.raises(UserError, match=said):
            pipeline.adapt(a, a2, b, **option)


def test_a_mix_edits_by_words_too(pictures, mixes, saved, monkeypatch):
    """Without an analogy, through a session of the mix."""
    folder, images = pictures
    opened = []

    def session(self, mix, folded):
        opened.append(mix)
        return contextlib.nullcontext(SimpleNamespace(generate=lambda prompt, image, **_: image))

    monkeypatch.setattr(Pipeline, "session", session)
    arguments = [
        "--pipeline",
        str(PIPELINE),
        "--basis",
        str(BASIS),
        "--image",
        str(folder / "b.png"),
        "--prompt",
        "red",
    ]
    second = saved / "second.safetensors"
    edit.main([*arguments, "--mix", str(second), "--strength", "0.5", "--out", str(saved / "words.png")])
    np.testing.assert_array_equal(read_image(saved / "words.png"), images["b"])
    same(opened[0], 0.5 * mixes[1])
    with pytest.raises(UserError, match="chooses a mix by an analogy, and none was given"):
        edit.main([*arguments, "--strength", "0.5", "--out", str(saved / "more.png")])


def test_b_keeps_its_shape(pipeline, pictures, mixes, saved, capsys):
    """From Python, a session and the command: what is shown is edited, by the coefficients for b. Nothing is said of
    stretching but where that is done."""
    folder, images = pictures
    a, a2 = images["a"], images["a2"]
    wide = np.random.default_rng(1).integers(0, 256, (16, 48, 3), np.uint8)
    write_image(saved / "wide.png", wide)
    mix = pipeline.coefficients(a, a2, wide)
    for fit, silent in (("pad", True), ("crop", True), ("restore", False)):
        capsys.readouterr()
        result = pipeline.edit(a, a2, wide, fit=fit, **FAST)
        assert result.shape == wide.shape and (capsys.readouterr().out == "") == silent
        place = placement(wide, (32, 32), fit)
        np.testing.assert_array_equal(result, place.back(pipeline.edit(a, a2, place.shown, mix=mix, **FAST)))
        with pipeline.session(mix, folded=False) as session:
            np.testing.assert_array_equal(session.edit(a, a2, wide, fit=fit, steps=1), result)
        command(pictures, saved, "--fit", fit, "--b", str(saved / "wide.png"), out=f"{fit}.png")
        np.testing.assert_array_equal(read_image(saved / f"{fit}.png"), result)
    capsys.readouterr()
    assert pipeline.edit(a, a2, wide, **FAST).shape == a.shape
    assert "b is stretched to a's shape" in capsys.readouterr().out
    with pytest.raises(UserError, match="fit is 'squash'; give stretch, restore, pad or crop"):
        pipeline.edit(a, a2, wide, fit="squash")


def test_what_is_refused(pipeline, pictures, mixes, saved, monkeypatch):
    other = Mix(mixes[0].coefficients, "0123456789abcdef")
    write_mix(saved / "foreign.safetensors", other)
    (saved / "cut.safetensors").write_bytes((saved / "first.safetensors").read_bytes()[:-8])
    tensors = dict(mixes[0].coefficients)
    safetensors.numpy.save_file(tensors, saved / "later.safetensors", {"lorweb_mix": "2", "basis": mixes[0].basis})
    safetensors.numpy.save_file(
        tensors, saved / "names.safetensors", {"lorweb_mix": "1", "basis": "x", "pictures": '["a"]'}
    )
    path, first = next(iter(tensors.items()))
    write_mix(saved / "short.safetensors", Mix(tensors | {path: first[:, :2]}, mixes[0].basis))
    monkeypatch.chdir(saved)
    before = sorted(saved.iterdir())
    for more, said in (
        (["--mix", "foreign.safetensors"], "foreign.safetensors is a mix of another basis .0123456789abcdef"),
        (["--mix", "first.safetensors", "foreign.safetensors"], "mixes of two bases"),
        (["--mix", str(BASIS)], "is no saved mix"),
        (["--mix", "cut.safetensors"], "cut.safetensors"),
        (["--mix", "later.safetensors"], "format 2, and 1 is read"),
        (["--mix", "names.safetensors"], "names.safetensors: pictures"),
        (["--mix", "short.safetensors"], "don't fit the basis"),
        (["--mix", "nowhere.safetensors:2"], "nowhere.safetensors does not exist"),
        (["--mix", "first.safetensors:lots"], "a number was expected; write FILE:0.5"),
        (["--mix", "first.safetensors:nan"], "the weight of --mix first.safetensors is nan"),
        (["--mix", "first.safetensors", "--at", "0.5"], "--at is a place between two --mix, and 1 were given"),
        (["--adapt", "0"], "--adapt is 0"),
        (["--strength", "1001"], "--strength is 1001"),
        (["--save-mix", "x.bin"], "must end in .safetensors"),
        (["--mix", "first.safetensors", "--save-mix", "first.safetensors", "--overwrite"], "one of the inputs"),
        (["--save-mix", "second.safetensors"], "exists already"),
        (["--save-mix", "x.safetensors", "--b", "b.png", "c.png", "--out", "r/"], "give one --b"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            command(pictures, saved, *more)
        assert "\n" not in str(caught.value) and sorted(saved.iterdir()) == before
    with pytest.raises(UserError, match="2 images were given by --a and 1 by --a2"):
        command(pictures, saved, a=("a", "c"))
    with pytest.raises(UserError, match="2 example pairs were given beside --mix"):
        command(pictures, saved, "--mix", "first.safetensors", a=("a", "c"), a2=("a2", "c2"))
    with pytest.raises(UserError, match="--strength is of a basis"):
        edit.main(["--prompt", "x", "--out", "x.png", "--strength", "2"])
    with pytest.raises(UserError, match="--fit pad is of an analogy"):
        edit.main(["--prompt", "x", "--out", "x.png", "--fit", "pad"])
    with pytest.raises(UserError, match="neither --out nor --save-mix"):
        edit.main(["--prompt", "x"])
    with pytest.raises(UserError, match="foreign.safetensors is a mix of another basis"):
        pipeline.load_mix("foreign.safetensors")
