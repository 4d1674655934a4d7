"""The edit command: what it writes, where, and what it says of bad requests."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from golden import golden_dir
from PIL import Image

from lorweb_jax import Pipeline, UserError, edit, read_image, write_image
from lorweb_jax.files.checkpoint import read_all
from lorweb_jax.files.safetensors_io import Spec, write_stream
from lorweb_jax.nn.layers import Unstacked

PIPELINE, BASIS = golden_dir() / "tiny_pipeline", golden_dir() / "basis_a.safetensors"


@pytest.fixture(scope="module", autouse=True)
def read_once(quick_module):
    """The pipeline is read and the basis attached once for all of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "load", functools.cache(Pipeline.load))
        patch.setattr(Pipeline, "attach", functools.cache(Pipeline.attach))
        yield


@pytest.fixture
def images(tmp_path):
    recorded = np.load(golden_dir() / "e2e_square.npz")
    names = {"a": "image_a", "a2": "image_atag", "b": "image_b"}
    for name, key in names.items():
        write_image(tmp_path / f"{name}.png", recorded[key])
    write_image(tmp_path / "c.png", recorded["image_atag"])
    return tmp_path


def arguments(folder, *more, b=("b.png",), out="out.png"):
    return [
        "--pipeline",
        str(PIPELINE),
        "--basis",
        str(BASIS),
        "--a",
        str(folder / "a.png"),
        "--a2",
        str(folder / "a2.png"),
        "--b",
        *(str(folder / name) for name in b),
        "--out",
        f"{folder}/{out}",
        "--steps",
        "1",
        *more,
    ]


@pytest.fixture
def never_loads(monkeypatch):
    def load(*_, **__):
        raise AssertionError("the pipeline was loaded before the request was found to be bad")

    monkeypatch.setattr(Pipeline, "load", load)


def listed(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def test_one_and_several(images, monkeypatch, capsys):
    """Into a file, and into a folder whose name has a dot and that isn't there yet."""
    edit.main(arguments(images))
    edit.main(arguments(images, b=("b.png", "c.png"), out="results/v1.5"))
    one, first, second = (read_image(images / name) for name in ("out.png", "results/v1.5/b.png", "results/v1.5/c.png"))
    assert one.shape == first.shape == second.shape == (64, 64, 3)
    # Folded for one, beside the weights for two: the same image but for rounding.
    assert np.abs(one.astype(int) - first).max() <= 1
    assert np.abs(first.astype(int) - second).max() > 1
    told = capsys.readouterr().out.splitlines()  # the recorded a2 and b have other shapes than a
    assert [line.split()[0] for line in told] == ["a2", "b", "wrote", "a2", "b", "wrote", "wrote"]
    # Again: nothing is replaced, unless it is asked for.
    with pytest.raises(UserError, match="out.png exists already"):
        edit.main(arguments(images, "--seed", "1"))
    np.testing.assert_array_equal(read_image(images / "out.png"), one)
    loaded, load = [], Pipeline.load
    monkeypatch.setattr(Pipeline, "load", lambda *args, **more: loaded.append(load(*args, **more)) or loaded[0])
    edit.main(arguments(images, "--seed", "1", "--overwrite", "--unstacked"))
    assert isinstance(loaded[0].model.transformer.transformer_blocks, Unstacked)
    assert np.abs(read_image(images / "out.png").astype(int) - one).max() > 1


@pytest.mark.parametrize(
    "out, bs, written",
    [
        ("r.png", ["b.png"], ["r.png"]),
        ("r.JPG", ["b.png"], ["r.JPG"]),
        ("r", ["x/b.jpg"], ["r/b.png"]),
        ("r/", ["b.png"], ["r/b.png"]),
        ("v1.5/", ["b.png"], ["v1.5/b.png"]),
        ("v1.5", ["b.png"], ["v1.5/b.png"]),
        ("v1.5", ["b.png", "c.png"], ["v1.5/b.png", "v1.5/c.png"]),
        ("r.png/", ["b.png"], ["r.png/b.png"]),
        ("my.results", ["b.png", "c.png"], ["my.results/b.png", "my.results/c.png"]),
    ],
)
def test_where_results_go(tmp_path, out, bs, written):
    found = edit.targets(f"{tmp_path}/{out}", [tmp_path / b for b in bs])
    assert found == [tmp_path / name for name in written]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--steps", "0"], "--steps is 0"),
        (["--steps", "1001"], "1 to 1,000"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--guidance", "inf"], "--guidance is inf"),
        (["--guidance", "-1"], "--guidance"),
        (["--seed", "-1"], "--seed is -1"),
        (["--seed", str(2**64)], "18,446,744,073,709,551,615"),
        (["--max-size", "15"], "--max-size is 15"),
        (["--steps", "many"], "--steps"),
        (["--apply", "folded", "--b", "b.png", "c.png"], "folded serves one"),
        (["--out", "r.gif"], "suffix .gif"),
        (["--out", "r.safetensors"], "suffix .safetensors"),
        (["--out", "/dev/null/r.png"], "no folder"),
        (["--a", "missing.png"], "missing.png"),
        (["--b", "b.png", "missing.png", "--out", "results"], "missing.png"),
        (["--b", "b.png", "c.png"], "give a folder"),
        (["--image", "b.png"], "--image was given beside an analogy"),
        (["--size", "64x64"], "--size was given beside an analogy"),
        (["--true-guidance", "nan"], "--true-guidance is nan"),
        (["--negative-prompt", "red"], "--negative-prompt does nothing"),
        (["--b", "x/a.png", "y/A.jpg", "--out", "results"], "results"),
        (["--out", "b.png", "--overwrite"], "one of the inputs"),
        (["--out", ".", "--overwrite"], "one of the inputs"),
        (["--out", "./"], "one of the inputs"),
        (["--out", "b.png"], "one of the inputs"),
        (["--out", "c.png"], "exists already"),
        (["--max-size", "16", "--a", "wide.png"], "at least 16x16"),
    ],
)
def test_bad_requests_are_told_before_anything_is_loaded(images, monkeypatch, never_loads, more, said):
    monkeypatch.chdir(images)
    Image.new("RGB", (90, 9)).save("wide.png")
    before = {name: (images / name).read_bytes() for name in listed(images)}
    with pytest.raises(UserError, match=said) as caught:
        edit.main(arguments(images, *more))
    assert "\n" not in str(caught.value) and caught.value.code in (1, 2)
    assert {name: (images / name).read_bytes() for name in listed(images)} == before


def by_words(folder, *more):
    return ["--pipeline", str(PIPELINE), "--prompt", "a red frame", "--steps", "1", "--out", f"{folder}/made/", *more]


def test_by_instruction_and_from_text_alone(images):
    """One result of a text, one for each of several images; as from Python."""
    edit.main(by_words(images, "--size", "48x32", "--true-guidance", "2", "--negative-prompt", "blue"))
    write_image(images / "d.png", read_image(images / "b.png")[::-1])
    edit.main(by_words(images, "--image", str(images / "b.png"), str(images / "d.png"), "--guidance", "3.5"))
    pipeline = Pipeline.load(PIPELINE)
    drawn = pipeline.generate("a red frame", size=(48, 32), steps=1, true_guidance=2, negative_prompt="blue")
    np.testing.assert_array_equal(read_image(images / "made/result.png"), drawn)
    for name in ("b.png", "d.png"):
        expected = pipeline.generate("a red frame", read_image(images / name), steps=1)
        np.testing.assert_array_equal(read_image(images / "made" / name), expected)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--prompt", ""], "neither an analogy nor a prompt"),
        (["--a", "a.png"], "--a2 and --b not given"),
        (["--a", "a.png", "--b", "b.png"], "--a2 not given"),
        (["--size", "64"], "'64' is no size; give one such as 1024x768"),
        (["--size", "64x8"], "--size is 8; give a whole number from 16"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "b.png", "c.png", "--out", "x.png"], "2 results are asked for, and --out is one file"),
        (["--out", "x.gif"], "suffix .gif"),
        (["--image", "b.png", "--out", "b.png", "--overwrite"], "one of the inputs"),
    ],
)
def test_bad_requests_without_an_analogy(images, monkeypatch, never_loads, more, said):
    monkeypatch.chdir(images)
    before = listed(images)
    with pytest.raises(UserError, match=said) as caught:
        edit.main(by_words(images, *more))
    assert "\n" not in str(caught.value) and listed(images) == before


def test_a_router_asks_for_an_analogy(images):
    with pytest.raises(UserError, match="chooses a mix by an analogy, and none was given; give --a, --a2 and --b"):
        edit.main(by_words(images, "--image", str(images / "b.png"), "--basis", str(BASIS)))


@pytest.mark.parametrize("more", [["--basis", "nowhere"], ["--pipeline", "nowhere"]])
def test_missing_files(images, more):
    with pytest.raises(UserError, match="nowhere"):
        edit.main(arguments(images, *more))


def test_a_terminal_shows_the_steps(images, monkeypatch, capsys):
    def edit_batch(self, analogies, prompts, *, steps, callback, **_):
        for step in range(steps):
            callback(step, None)
        return [b for _, _, b in analogies]

    monkeypatch.setattr(Pipeline, "edit_batch", edit_batch)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    edit.main(arguments(images, "--steps", "3"))
    assert "sampling: 100%" in (said := capsys.readouterr().out) and "3/3" in said


def test_not_a_number_makes_no_picture(images):
    tensors, metadata = read_all(BASIS)
    name = next(name for name in tensors if name.endswith("lora_B"))
    tensors[name] = tensors[name].copy()
    tensors[name].flat[3] = np.inf
    write_stream(
        images / "basis.safetensors",
        {key: Spec(array.shape, array.dtype) for key, array in tensors.items()},
        tensors.get,
        metadata,
    )
    with pytest.raises(UserError, match="basis.safetensors: .*lora_B.* infinity in 1 of"):
        edit.main(arguments(images, "--basis", str(images / "basis.safetensors")))
    assert not (images / "out.png").exists()


def test_what_is_told(images, capsys):
    """A b of another shape, a prompt that is longer than the encoders take, and one that isn't UTF-8."""
    Image.open(images / "b.png").resize((48, 64)).save(images / "tall.png")
    edit.main(arguments(images, "--prompt", "gold " * 600 + "\udce9", b=("tall.png",)))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5
    assert "not UTF-8" in told[0]
    assert "b is stretched" in told[2] and "48x64" in told[2] and "64x64" in told[2]
    assert "CLIP's 77 tokens" in told[3] and "T5's" in told[3] and "gold" in told[3] and len(told[3]) < 400


def test_one_result_that_fails_does_not_cost_the_others(images, monkeypatch):
    write = edit.write_image

    def fails(path, *rest):
        if path.name == "b.png":
            raise UserError("the disk is full")
        return write(path, *rest)

    monkeypatch.setattr(edit, "write_image", fails)
    with pytest.raises(UserError, match="1 of 2 results are not written: the disk is full"):
        edit.main(arguments(images, b=("b.png", "c.png"), out="results"))
    assert listed(images / "results") == ["c.png"]


def test_help_is_quick_and_errors_are_one_line():
    command = [sys.executable, "-m", "lorweb_jax.edit"]
    assert (
        "a is to a2 as b is to the result"
        in subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    )
    wrong = subprocess.run(
        [*command, "--a", "x.png", "--a2", "x.png", "--b", "x.png", "--out", os.devnull + ".png"],
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and "x.png" in wrong.stderr
