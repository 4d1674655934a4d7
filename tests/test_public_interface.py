"""Whatever is handed to the public interface: a result, or one sentence that names it. And seeds, of which all 64 bits
count, texts and numbers that are none."""

import functools
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from golden import golden_dir

import lorweb_jax
from lorweb_jax import Basis, BasisConfig, Mix, Pipeline, UserError, read_image, write_image
from lorweb_jax.adapters.basis import LayerShape
from lorweb_jax.common.finite import is_finite, require_finite
from lorweb_jax.files.safetensors_io import write
from lorweb_jax.images.grid import other_shape, stretched
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.models.tokenizers.folder import load_clip_tokenizer, load_t5_tokenizer
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.settings.texts import as_text

FOLDER = golden_dir() / "tiny_pipeline"


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(FOLDER).attach(golden_dir() / "basis_a.safetensors")


@pytest.fixture(scope="module")
def images():
    recorded = np.load(golden_dir() / "e2e_square.npz")
    return recorded["image_a"], recorded["image_atag"], recorded["image_b"]


@pytest.fixture(scope="module")
def mix(pipeline, images):
    return pipeline.coefficients(*images)


@pytest.fixture(scope="module")
def coefficients(mix):
    return dict(mix.coefficients)


@pytest.fixture
def refused(capsys):
    def call(said, function, *arguments, **options):
        with pytest.raises(UserError, match=said) as caught:
            function(*arguments, **options)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

    return call


@pytest.mark.parametrize(
    "name, values",
    [
        ("steps", ("a", None, 0, -1, 1.5, 28.0, math.inf, math.nan, True, 10**9, 10**5000, [1], np.float32(2))),
        ("guidance", ("2.5", None, math.nan, math.inf, -1, 101, True, [2.5], 1e400, np.nan, 1j)),
        ("seed", ("a", None, -1, 2**64, 0.5, True, [-1], [0, 1], [], math.nan, 10**5000)),
        ("max_size", ("a", 0, -5, 15, 64.0, math.inf, True, 10**12)),
        ("folded", (0, 1, "yes", [])),
        ("prompt", (None, 1, b"bytes", ["list"], math.nan)),
        ("mix", (1, "x", [], {}, {"x": 1}, {1: 2})),
        ("strength", ("a", None, math.nan, 1001, True, [1])),
        ("fit", (None, 1, "squash", ["pad"])),
    ],
)
def test_edit_refuses(pipeline, images, refused, name, values):
    for value in values:
        refused(name, pipeline.edit, *images, **{name: value})


def test_edit_refuses_images(pipeline, images, refused):
    a, a2, b = images
    for value in (
        "a.png",
        None,
        1,
        a / 255,
        a > 9,
        a.astype(np.uint16),
        a[..., 0],
        a[:, :, :2],
        a.tolist(),
        torch.from_numpy(a),
        a.transpose(2, 0, 1),
        np.zeros((0, 4, 3), np.uint8),
    ):
        refused("^a2 ", pipeline.edit, a, value, b)
        refused("^b ", pipeline.coefficients, a, a2, value)
        refused("^a of analogy 1 ", pipeline.edit_batch, [images, (value, a2, b)], ["", ""])
        refused("^a ", pipeline.query, [(value, a2, b)])
    tiny = np.zeros((1, 1, 3), np.uint8)
    refused("2x2 pixels", pipeline.edit, tiny, tiny, tiny)
    long = np.zeros((7, 4000, 3), np.uint8)
    refused("8000x14 pixels", pipeline.edit, long, long, long)
    clip = ImageProcessor((0.5,) * 3, (0.5,) * 3, shortest_edge=224, crop=(224, 224))
    refused("less extreme", clip.resized, np.zeros((8, 80_000, 3), np.uint8))  # 224 x 2,240,000
    refused("at most 80,000,000", pipeline.edit, a, a2, np.broadcast_to(b[:1, :1], (9000, 9000, 3)))


def test_batches_refuse(pipeline, images, refused):
    for conditions in (None, [], images, [images[:2]], "abc", 1, [None]):
        refused("analog", pipeline.edit_batch, conditions, [""])
    for prompts in (None, "text", [], ["", ""], [None], 5):
        refused("prompt", pipeline.edit_batch, [images], prompts)
    refused("prompts are 'abc'", pipeline.prompt, "abc")
    wrong = np.zeros((1, 3, 5), np.float32)
    for noise in (wrong, "noise", 1.0, [[1, 2]], np.full((1, 64, 64), "x")):
        refused("the noise is", pipeline.edit_batch, [images], [""], noise=noise)


def test_coefficients_must_fit(pipeline, coefficients, refused):
    path = next(iter(coefficients))
    for value in (None, "x", 1.0, coefficients[path].astype(str), coefficients[path] * 1j, [[1.0], [1.0, 2.0]]):
        refused("the coefficients of '" + path.replace(".", r"\."), pipeline.mix, coefficients | {path: value})
    refused(
        "don't fit the basis: of " + path.replace(".", r"\."),
        pipeline.mix,
        coefficients | {path: coefficients[path][:, :1]},
    )
    refused("which has no more", pipeline.mix, coefficients | {"more": coefficients[path]})
    for bad in (np.nan, np.inf):
        refused("coefficients of " + path, pipeline.mix, coefficients | {path: coefficients[path] * bad})
    for member in (8, -1, "content", None, 1.0, True, {}):
        refused("member|coefficients", pipeline.mix, member)


def test_mixes_of_another_basis(pipeline, images, mix, refused, tmp_path):
    """Another basis of the same shapes: combined with none of this one's mixes, and not taken by its pipeline."""
    other = Pipeline.load(FOLDER).attach(golden_dir() / "basis_c.safetensors").mix(0)
    other = Mix({path: c[:, :1] + np.zeros(8) for path, c in other.coefficients.items()}, other.basis)
    for combine in (Mix.__add__, Mix.__sub__, functools.partial(Mix.lerp, t=0.5)):
        refused("two bases", combine, mix, other)
    refused("another basis", pipeline.edit, *images, mix=other)
    refused("another basis", pipeline.save_lora, tmp_path / "never.safetensors", other)
    for combine in (Mix.__add__, Mix.__radd__, Mix.__sub__, Mix.__mul__, Mix.__truediv__):
        refused("Mix|mix", combine, mix, "x")
    refused("by 0", Mix.__truediv__, mix, 0)
    refused("infinity", Mix.__mul__, mix / 1e-30, 1e30)


def test_a_result_that_is_no_number_is_none(pipeline, images, coefficients, refused):
    """Coefficients so large that the transformer overflows; noise that is no number."""
    refused(
        "no result: the latents after sampling holds",
        pipeline.edit,
        *images,
        steps=1,
        folded=False,
        mix=pipeline.mix({path: coeff + np.float32(1e30) for path, coeff in coefficients.items()}),
    )
    noise = np.load(golden_dir() / "e2e_square.npz")["latents_packed"].copy()
    refused("the noise is .*32", pipeline.edit_batch, [images], [""], noise=noise[:, :-1])
    noise[0, 3, 5] = np.nan
    refused("the noise holds not-a-number in 1", pipeline.edit_batch, [images], [""], noise=noise)


def test_files_that_are_never_written(pipeline, mix, refused, tmp_path):
    save = functools.partial(pipeline.save_lora, tmp_path / "a.safetensors")
    for value in (1, "x", None, {"x": 1}, mix.coefficients):
        refused("the mix is", save, value)
    refused("float32", save, mix * 1e9, dtype="float16")
    for name, values in (
        ("rank", ("a", 0, -1, 1.5, 10**9, True)),
        ("dtype", (None, "int8", "x", 5, [1])),
        ("alpha", ("x", -1, math.nan, math.inf)),
        ("names", ("x", None, [1])),
    ):
        for value in [value for value in values if (name, value) != ("rank", None)]:
            refused(name, save, mix, **{name: value})
    for path in (None, 5, tmp_path / "a.bin", tmp_path, tmp_path / "there.safetensors"):
        (tmp_path / "there.safetensors").mkdir(exist_ok=True)
        refused("file|could not be written", pipeline.save_lora, path, mix)
        refused("file|could not be written", pipeline.save_basis, path)
    refused("dtype", pipeline.save_basis, tmp_path / "b.safetensors", dtype="int8")
    refused("not-a-number in 1 of 3 places", write, tmp_path / "c.safetensors", {"x": np.array([0, np.nan, 1])})
    assert [file.name for file in tmp_path.iterdir()] == ["there.safetensors"]
    refused("one of the inputs", pipeline.save_basis, golden_dir() / "basis_a.safetensors")
    refused("one of the inputs", pipeline.save_lora, golden_dir() / "basis_a.safetensors", mix)


def test_loading_refuses(pipeline, refused):
    for folder in (None, 5, ["x"], "nowhere"):
        refused("pipeline|nowhere", Pipeline.load, folder)
    for name, values in (
        ("dtype", ("x", None, "int8", 5)),
        ("attention", ("x", None, [1])),
        ("quantization", ("x", None, [1])),
        ("image_encoder", (5, "nowhere")),
    ):
        for value in values:
            refused(f"{name.replace('_', ' ')}|nowhere", Pipeline.load, FOLDER, **{name: value})
    for basis in (None, 5, [], "nowhere"):
        refused("the basis is|nowhere", pipeline.attach, basis)
    other = Basis(BasisConfig(size=2, query_dim=6), {"layer": LayerShape(1, 3, 5)}, rngs=nnx.Rngs(0))
    refused("adapts layer", pipeline.attach, other)


@pytest.mark.parametrize(
    "change",
    [
        {"size": "a"},
        {"size": 1.5},
        {"size": True},
        {"size": 0},
        {"rank": None},
        {"key_dim": 10**12},
        {"heads": [1]},
        {"activation": None},
        {"query": 5},
        {"scale": math.nan},
        {"scale": "x"},
        {"query_dim": -1},
        {"projection": ["linear"]},
    ],
)
def test_basis_config_refuses(change, refused):
    refused("basis." + next(iter(change)), BasisConfig, **change)


def test_basis_from_arrays_refuses(refused):
    good = {"layer": {"a": np.zeros((1, 2, 3, 1)), "b": np.zeros((1, 2, 1, 3))}}
    config = BasisConfig(size=2, rank=1, query="fixed")
    assert Basis.from_arrays(config, good).layers
    for config_, arrays in (
        (None, good),
        (config, None),
        (config, {}),
        (config, {"layer": None}),
        (config, {"layer": {}}),
        (config, {"layer": good["layer"] | {"a": np.zeros(3)}}),
        (config, {"layer": good["layer"] | {"b": np.zeros((1, 3, 1, 3))}}),
    ):
        refused("basis", Basis.from_arrays, config_, arrays)


def test_images_read_and_written(refused, tmp_path):
    for path in (None, 5, b"a.png", ["a.png"]):
        refused("path", read_image, path)
        refused("path", write_image, path, np.zeros((1, 1, 3), np.uint8))
    for image in (None, "a", np.zeros((2, 2)), np.ones((2, 2, 3))):
        refused("the image to write", write_image, tmp_path / "a.png", image)
    refused("suffix", write_image, tmp_path / "a.gif", np.zeros((1, 1, 3), np.uint8))
    refused("at most 16383 a side", write_image, tmp_path / "a.webp", np.zeros((1, 16384, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_exported_names():
    assert all(getattr(lorweb_jax, name) for name in lorweb_jax.__all__)


def test_every_bit_of_a_seed_counts():
    """Below 2^32 as ever; each single bit, and each pair of seeds that were the same image, gives another key."""
    seeds = [0, 7, 2**32 - 1, *(1 << bit for bit in range(64)), 2**64 - 1, 2**32 + 7, 9007199254740999, 2**63]
    keys = {seed: tuple(np.asarray(jax.random.key_data(random_key(seed))).tolist()) for seed in seeds}
    assert len(set(keys.values())) == len(set(seeds))
    for seed in (0, 7, 2**31, 2**32 - 1):
        assert keys[seed] == tuple(np.asarray(jax.random.key_data(jax.random.key(seed))).tolist())
    assert keys[7] == tuple(np.asarray(jax.random.key_data(random_key(np.uint64(7)))).tolist())


def test_seeds_make_other_images(pipeline, images):
    made = [pipeline.edit(*images, steps=1, folded=False, seed=seed) for seed in (7, 2**32 + 7, 2**64 - 1)]
    assert all(np.abs(one.astype(int) - other).max() > 1 for one, other in zip(made, made[1:] + made[:1]))


@pytest.mark.parametrize(
    "dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
)
def test_finite_is_told_of_every_bit_pattern(dtype):
    """Against numpy's own isfinite: all codes of up to 16 bits, and the borders of the wider ones."""
    bits = np.dtype(dtype).itemsize * 8
    if bits <= 16:
        values = np.arange(1 << bits).astype(f"u{bits // 8}").view(dtype)
    else:
        top = np.finfo(dtype)
        values = np.array(
            [0, -0.0, 1, top.max, top.min, top.tiny, np.inf, -np.inf, np.nan, top.smallest_subnormal], dtype
        )
    expected = np.isfinite(values.astype(np.float32) if bits < 32 else values)
    assert [is_finite(values[i : i + 1]) for i in range(len(values))] == expected.tolist()
    assert is_finite(values[expected][::-1]) and not is_finite(values.reshape(2, -1).T)
    with pytest.raises(UserError, match=r"x holds (not-a-number|infinity) in [\d,]+.* of"):
        require_finite(values, "x", "do something")


def test_texts():
    assert as_text("caf\u00e9 \u56fe\0\n\x1b[0m", "it") == "caf\u00e9 \u56fe\0\n\x1b[0m"
    assert as_text("dor\udce9 \ud800", "it") == "dor\ufffd \ufffd"
    for value in (None, 5, b"x", ["x"]):
        with pytest.raises(UserError, match="it is .* a text"):
            as_text(value, "it")


@pytest.mark.parametrize(
    "text",
    ["", "caf\u00e9", "\0", "\x1b[31m", "a\nb\tc", "\u56fe" * 50, "\ufdfa" * 9, "\udce9", "\u202e", "\U0001f600" * 40],
)
def test_any_text_becomes_an_embedding(pipeline, text):
    found, pooled = pipeline.prompt([text])
    assert np.isfinite(np.asarray(found)).all() and np.isfinite(np.asarray(pooled)).all()


def test_what_of_a_text_is_left_out():
    """The text's own end, from the first token on that isn't taken; what stands before it is taken whole."""
    clip, t5 = load_clip_tokenizer(str(FOLDER / "tokenizer")), load_t5_tokenizer(str(FOLDER / "tokenizer_2"))
    for tokenizer, ends in ((clip, 2), (t5, 1)):
        for text in ("a frame", "put a golden frame around it, and another one " * 12, "\ufdfa" * 9):
            length = len(tokenizer.backend.encode(text).ids)
            assert tokenizer.left_out(text, length) == ""
            for fewer in range(1, min(5, length - ends)):
                rest = tokenizer.left_out(text, length - fewer)
                assert rest and text.rstrip().endswith(rest)
                assert len(tokenizer.backend.encode(text.rstrip().removesuffix(rest)).ids) <= length - fewer


def test_other_shapes():
    for size, target, expected in (
        ((48, 64), (64, 48), True),
        ((32, 24), (64, 48), False),
        ((1000, 667), (640, 427), False),
        ((33, 25), (64, 48), False),
        ((100, 100), (64, 60), True),
        ((1, 1), (64, 48), True),
    ):
        assert other_shape(size, target) is expected
    flat = [np.zeros((height, width, 3), np.uint8) for width, height in ((64, 48), (32, 24), (48, 64))]
    [sentence] = stretched([tuple(flat), tuple(flat[:2]) + (flat[1],)])
    assert sentence.startswith("b is stretched to a's shape in 1 of 2 analogies") and "48x64 to 64x48" in sentence


def test_texts_of_an_ascii_command_line():
    """Python hands over bytes that it can't read as lone surrogates; UTF-8 among them is read as such."""
    from lorweb_jax.settings.texts import as_text

    seen = "cadre doré 😀".encode().decode("ascii", "surrogateescape")
    assert as_text(seen, "x") == "cadre doré 😀"
    assert as_text("dor\udce9", "x") == "dor\N{REPLACEMENT CHARACTER}"


def test_an_option_that_there_is_not(pipeline):
    """Told with the nearest name, for every way of sampling."""
    image = np.zeros((32, 32, 3), np.uint8)
    for make in (
        lambda: pipeline.edit(image, image, image, stepz=2),
        lambda: pipeline.generate("a frame", image, stepz=2),
    ):
        with pytest.raises(UserError, match="no option stepz for sampling; near it: steps"):
            make()
