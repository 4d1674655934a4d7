"""Style guidance through the public interface, against the recorded published sampler; the stylize command.

test_parity.py has the recording of two styles, step by step.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from compare import relative
from golden import golden_dir

from lorweb_jax import Pipeline, UserError, read_image, stylize, write_image
from lorweb_jax.adapters.mixture import LowRankAdapter, added
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.pipeline.request import Sampling
from lorweb_jax.pipeline.stages import NEGATIVE, PROMPT, stages
from lorweb_jax.pipeline.styles import Styles, load_style

FOLDER, PAIR = golden_dir() / "tiny_pipeline", golden_dir() / "pair"
LAYERS = backbone(FluxConfig.from_json(json.loads((FOLDER / "transformer" / "config.json").read_text()))).adapted


pytestmark = pytest.mark.usefixtures("quick_module")


@pytest.fixture(scope="module")
def base(quick_module):
    return Pipeline.load(FOLDER)


def test_from_strings_to_latents(base):
    """The recorded published pipeline, with the folder's own tokenizers and encoders: 1e-5."""
    data = np.load(PAIR / "e2e_style.npz")
    style = base.style(PAIR / "style_a.safetensors", float(data["style_scales"][0]), str(data["style_words"]))
    seen = []
    base.stylize(
        str(data["prompt"]),
        style,
        size=(int(data["width"]), int(data["height"])),
        steps=4,
        true_guidance=float(data["cfg"]),
        style_start=int(data["style_start"]),
        guidance=float(data["guidance"]),
        negative_prompt=str(data["negative_prompt"]),
        published_times=True,
        noise=data["step0/latents"],
        callback=lambda step, latents: seen.append(latents),
    )
    for step in range(1, 4):
        assert relative(seen[step - 1], data[f"step{step}/latents"]) <= 1e-5
    final = data["final_latents"]  # [1, c, h, w]
    packed = final.reshape(1, 16, 5, 2, 7, 2).transpose(0, 2, 4, 1, 3, 5).reshape(1, 35, 64)
    assert relative(seen[3], packed) <= 1e-5


def shown(strengths=(), **sampling):
    """[(first, end, passes)] of the stages."""
    return [(stage.first, stage.end, stage.passes) for stage in stages(Sampling(**sampling), strengths)]


def test_passes_that_are_not_needed_are_not_run():
    p, n = PROMPT, NEGATIVE
    assert shown((6, 3), steps=50, true_guidance=4) == [(0, 10, (p, n)), (10, 50, (p, n, 0, 1))]
    assert shown((6, 3), steps=9, true_guidance=4, style_start=0) == [(0, 9, (p, n, 0, 1))]
    assert shown((0, 3), steps=9, style_start=2) == [(0, 2, (p,)), (2, 9, (p, 1))]
    assert shown((0, 0), steps=9, true_guidance=4, style_start=2) == [(0, 9, (p, n))]
    assert shown((-1,), steps=9, true_guidance=0, style_start=2) == [(0, 2, (n,)), (2, 9, (p, n, 0))]
    late = shown((2,), steps=9, true_guidance=4, true_guidance_start=5, style_start=2)
    assert late == [(0, 2, (p,)), (2, 5, (p, 0)), (5, 9, (p, n, 0))]
    assert shown(steps=9, true_guidance=4, true_guidance_start=3) == [(0, 3, (p,)), (3, 9, (p, n))]


# Small pictures and few programs: compiling is what takes time.
OPTIONS = dict(size=(32, 32), steps=2, style_start=0)


def test_no_strength_is_classifier_free_guidance_to_the_bit(base):
    plain = base.generate("a dog", size=(32, 32), steps=2, true_guidance=4, guidance=1.0)
    style = base.style(PAIR / "style_a.safetensors", words="in ink", strength=0)
    np.testing.assert_array_equal(base.stylize("a dog", style, **OPTIONS), plain)


# Over images, several at once, at another weight


def test_guidance_over_an_image_is_the_formula(base):
    """One step, against separate forwards of the transformer, one adapter each: relative error 1e-5."""
    random = np.random.default_rng(0)
    image, noise = random.integers(0, 255, (32, 32, 3), np.uint8), random.normal(size=(1, 4, 64)).astype(np.float32)
    styles = [base.style(PAIR / f"style_{name}.safetensors", words=name) for name in "ab"]
    seen = []
    base.stylize(
        "a dog",
        styles,
        image,
        steps=1,
        style_start=0,
        strengths=(3, -2),
        noise=noise,
        negative_prompt="blur",
        callback=lambda step, z: seen.append(z),
    )

    @jax.jit
    def velocity(model, text, pooled, adapters):
        one = jnp.ones(1)
        return model.velocity(noise, model.tokens(image[None]), text, pooled, one, one, (32, 32), adapters)

    basis = Styles(styles, base.folder.backbone.adapted).basis
    texts = base.prompt(["a dog", "blur", "a dog a", "a dog b"])
    names = ["base", "base", "style_a", "style_b"]
    prompt, negative, a, b = (
        np.asarray(velocity(base.model, *(part[row : row + 1] for part in texts), basis.adapters(basis.named([name]))))
        for row, name in enumerate(names)
    )
    expected = noise - (negative + 4 * (prompt - negative) + 3 * (a - prompt) - 2 * (b - prompt))
    assert relative(seen[0], expected) <= 1e-5


def test_several_at_once_are_each_alone(base):
    style = base.style(PAIR / "style_a.safetensors", 2, "in ink")
    noise = np.random.default_rng(1).normal(size=(2, 4, 64))
    with base.session(styles=style) as session:
        both = session.generate_batch(["a dog", "a cat"], noise=noise, **OPTIONS)
        alone = session.generate("a cat", noise=noise[1:], **OPTIONS)
    assert np.abs(alone.astype(int) - both[1]).max() <= 1 < np.abs(both[0].astype(int) - both[1]).max()


def test_rows_have_one_style_each_at_its_weight(base):
    """Styles of one name and of unequal rank; None where no pass has a style."""
    files = [PAIR / f"style_{name}.safetensors" for name in "aba"]
    styles = Styles(
        [base.style(file, words="", weight=w) for file, w in zip(files, (1, 0.5, -2))], base.folder.backbone.adapted
    )
    adapters = styles.adapters([PROMPT, NEGATIVE, 0, 1, 2], batch=2)
    rows = np.repeat([[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 0, -2]], 2, axis=0)
    for adapter in adapters.values():
        np.testing.assert_array_equal(adapter.coeff_bn[0], rows)
    assert styles.adapters([PROMPT, NEGATIVE], batch=2) is None
    assert styles.rows == ["style_a", "style_b", "style_a 2"]


def test_adapters_of_one_layer_add_up():
    """A style beside a basis, each on layers of its own and on one that both adapt; in float64."""
    rng = np.random.default_rng(0)

    def adapter(members):
        a, b, c = (rng.normal(size=shape) for shape in ((members, 6, 2), (members, 2, 5), (3, members)))
        return LowRankAdapter(*(jnp.asarray(part, jnp.float32) for part in (a, b, c)))

    one, other = {"p": adapter(2), "q": adapter(2)}, {"q": adapter(3), "r": adapter(3)}
    both = added(one, other)
    assert both["p"] is one["p"] and both["r"] is other["r"] and added(None, None) is None
    x = rng.normal(size=(3, 4, 6)).astype(np.float32)
    parts = (
        np.einsum("bsi,nir,bn,nro->bso", x, *(np.asarray(part, np.float64) for part in (a.a_nir, a.coeff_bn, a.b_nro)))
        for a in (one["q"], other["q"])
    )
    np.testing.assert_allclose(both["q"](x), sum(parts), rtol=1e-5, atol=1e-5)


# What a style may be


def test_loras_that_are_not_of_this_method_are_plain_styles(tmp_path, capsys):
    """XLabs' LoRAs of unequal ranks, and with an alpha, on some blocks only."""
    rng = np.random.default_rng(0)
    where = "single_blocks.1.processor.{}_lora"
    tensors = {}
    for name, rank, inputs, outputs in (("qkv", 2, 128, 384), ("proj", 3, 640, 128)):
        tensors[f"{where.format(name)}.down.weight"] = rng.normal(size=(rank, inputs)).astype(np.float32)
        tensors[f"{where.format(name)}.up.weight"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    for number, more in enumerate(({}, {f"{where.format('proj')}.alpha": np.float32(1.5)})):
        path = tmp_path / f"xlabs{number}.safetensors"
        safetensors.numpy.save_file({**tensors, **{key: np.asarray(value) for key, value in more.items()}}, path)
        member = load_style(path, LAYERS).member
        assert member.rank == 3 and set(member.blocks.values()) == {(1,)} and len(member.a) == 4
        path = "single_transformer_blocks.proj_out"
        expected = tensors[f"{where.format('proj')}.up.weight"] @ tensors[f"{where.format('proj')}.down.weight"]
        np.testing.assert_allclose(
            (member.a[path][1].T @ member.b[path][1]).T, expected * (0.5 if more else 1), rtol=1e-5, atol=1e-5
        )
    assert "without style words" in capsys.readouterr().out


def test_styles_of_another_model_are_refused(tmp_path):
    rope = {"attention_head_dim": 64, "axes_dims_rope": (16, 24, 24)}
    wide = backbone(FluxConfig(num_layers=2, num_single_layers=3, num_attention_heads=4, **rope)).adapted
    with pytest.raises(UserError, match="expected down .* use the file with its own model"):
        load_style(PAIR / "style_a.safetensors", wide)
    shallow = backbone(FluxConfig(num_layers=1, num_single_layers=3, num_attention_heads=2, **rope)).adapted
    with pytest.raises(UserError, match=r"adapts transformer_blocks\.1.*, which the model doesn't have"):
        load_style(PAIR / "style_a.safetensors", shallow)
    scalar = {
        "single_blocks.1.processor.proj_lora.down.weight": np.float32(1),
        "single_blocks.1.processor.proj_lora.up.weight": np.float32(1),
    }
    safetensors.numpy.save_file(
        {key: np.asarray(value) for key, value in scalar.items()}, tmp_path / "scalar.safetensors"
    )
    with pytest.raises(UserError, match=r"expected \[R, 640\]"):
        load_style(tmp_path / "scalar.safetensors", LAYERS)
    kind = {"lora_unet_single_blocks_0_linear2.lokr_w1": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(kind, tmp_path / "lokr.safetensors")
    with pytest.raises(UserError, match="holds LoKr .*give an ordinary LoRA"):
        load_style(tmp_path / "lokr.safetensors", LAYERS)


# The command


@pytest.fixture
def command(tmp_path, monkeypatch, base):
    """Runs the command on the pipeline that was read already, in a folder of its own."""
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: base)
    monkeypatch.chdir(tmp_path)
    for name, shade in (("p.png", 90), ("q.png", 200)):
        write_image(tmp_path / name, np.full((32, 32, 3), shade, np.uint8))

    def run(*arguments, style=(f"{PAIR / 'style_a.safetensors'}:3:in ink",)):
        stylize.main(
            [*"--pipeline".split(), str(FOLDER), "--style", *style, *"--steps 2 --style-start 0".split(), *arguments]
        )

    return run


def test_command_draws(command, base, tmp_path, capsys):
    """As from Python; several prompts, an image, and a sheet."""
    style = base.style(PAIR / "style_a.safetensors", 3, "in ink")
    drawn = base.stylize("a dog", style, **OPTIONS)
    command("--prompt", "a dog", "A cat, asleep!", "--size", "32x32", "--out", "made/")
    np.testing.assert_array_equal(read_image("made/a-dog.png"), drawn)
    assert sorted(path.name for path in tmp_path.glob("made/*")) == ["a-cat-asleep.png", "a-dog.png"]
    command("--prompt", "a dog", "--image", "p.png", "--out", "styled/")
    over = base.stylize("a dog", style, read_image("p.png"), **OPTIONS | {"size": None})
    np.testing.assert_array_equal(read_image("styled/p.png"), over)
    assert "wrote styled/p.png: 32x32 pixels" in capsys.readouterr().out
    prompts = ("--prompt", "a dog", "A cat, asleep!")
    unstated = [f"{PAIR / 'style_a.safetensors'}::in ink"]
    command(*prompts, "--size", "32x32", "--out", "sheet.png", "--sheet", "--strength", "0", "3", style=unstated)
    sheet = read_image("sheet.png")
    assert sum(contains(sheet, image) for image in (drawn, read_image("made/a-cat-asleep.png"))) == 2
    assert contains(sheet, base.stylize("a dog", style, strengths=[0], **OPTIONS))
    assert not contains(sheet, over)


def contains(sheet, image) -> bool:
    """Whether a sheet shows a picture, enlarged three times as small ones are."""
    enlarged = np.repeat(np.repeat(image, 3, 0), 3, 1)
    height, width = (side - own + 1 for side, own in zip(sheet.shape, enlarged.shape[:2]))
    corners = np.argwhere((sheet[:height, :width] == enlarged[0, 0]).all(axis=2))
    return any((sheet[y : y + len(enlarged), x : x + enlarged.shape[1]] == enlarged).all() for y, x in corners)


def test_words_may_be_longer_than_a_files_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:b").touch()
    words = "in ink, " * 60
    assert stylize.style_argument(f"a:b:2:{words}") == (Path("a:b"), 2.0, words)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "neither a prompt nor an image"),
        (["--prompt", "x", "--strength", "much"], "--strength: invalid float value: 'much'"),
        (["--prompt", "x", "--strength", "nan"], "strength is nan"),
        (["--prompt", "x", "--strength", "1", "2"], "--sheet draws several"),
        (["--prompt", "x", "--style", "f:much"], "the strength in 'f:much' is 'much', a number was expected"),
        (
            ["--prompt", "x", "--style-start", "2"],
            "--style-start is 2, but the 2 steps are counted from 0; give 0 to 1",
        ),
        (["--prompt", "x", "--true-guidance-start", "-1"], "--true-guidance-start is -1"),
        (["--prompt", "x", "--true-guidance", "1", "--negative-prompt", "y"], "--negative-prompt does nothing"),
        (["--prompt", "x", "--true-guidance", "1", "--true-guidance-start", "1"], "start does nothing"),
        (["--prompt", "x", "--true-guidance", "-1"], "--true-guidance is -1"),
        (["--prompt", "x", "--weight", "inf"], "--weight is inf"),
        (["--prompt", "x", "y", "z", "--image", "p.png", "q.png", "--out", "r/"], "3 prompts and 2 images"),
        (["--prompt", "x", "y"], "2 results are asked for, and --out is one file"),
        (["--prompt", " "], "neither a prompt nor an image"),
        (
            ["--prompt", "x", "--sheet"],
            "so that .*style_a.safetensors:3 has no use for its own; write FILE, or FILE::W",
        ),
        (["--prompt", "x", "--strength", "1"], "each states its own; leave out either"),
        (["--prompt", "x", "--step", "1"], "step 1 is that of a run's checkpoint, and .* is no run"),
        (["--prompt", "x", "--max-size", "64"], "--max-size is of images, and none was given"),
        (["--prompt", "x", "--basis-config", "c.yaml"], "--basis-config is of a basis, and no --basis was given"),
        (["--prompt", "x", "--image-encoder", "clip"], "--image-encoder is of a basis, and no --basis was given"),
        (["--prompt", "x", "--out", "p.png", "--image", "p.png"], "one of the inputs"),
        (["--prompt", "x", "--a", "p.png"], "--a2 and --b not given"),
        (
            ["--prompt", "x", "--style", "nowhere.safetensors"],
            "there is no nowhere.safetensors; give the file of a style",
        ),
        (["--prompt", "x", "--style", str(PAIR / "content_a.safetensors")], "by its name or header a content adapter"),
        (["--prompt", "x", "--style", str(golden_dir() / "basis_a.safetensors")], "is a LoRWeB basis, and a style is"),
        (["--prompt", "x", "--style", str(FOLDER / "vae")], "vae is an autoencoder, and a style is a single adapter"),
        (
            ["--prompt", "x", "--basis", str(golden_dir() / "basis_a.safetensors")],
            "chooses a mix by an analogy, and none was given; give --a, --a2 and --b, or leave --basis out",
        ),
    ],
)
def test_bad_requests(command, tmp_path, arguments, said):
    """One sentence, before the weights are loaded, and nothing is written."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said) as caught:
        command(*(arguments if "--out" in arguments else [*arguments, "--out", "x.png"]))
    assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "said, options",
    [
        ("style_start is 4 and there are 4 steps", {"style_start": 4}),
        ("style_start is -1", {"style_start": -1}),
        ("2 strengths were given for 1 styles", {"strengths": [1, 2]}),
        ("a style's strength is 'x'", {"strengths": ["x"]}),
        ("the strengths are 3", {"strengths": 3}),
        ("published_times is 1", {"published_times": 1}),
        ("true_guidance_start was given and true_guidance is 1", {"true_guidance": 1, "true_guidance_start": 2}),
    ],
)
def test_bad_options(base, said, options):
    style = base.style(PAIR / "style_a.safetensors", words="")
    with pytest.raises(UserError, match=said):
        base.stylize("x", style, **{"size": (32, 32), "steps": 4} | options)


def test_bad_styles(base, capsys):
    for said, call in [
        ("the strength of the style style_a is 'x'", lambda: base.style(PAIR / "style_a.safetensors", "x")),
        ("the style is '', and no path", lambda: base.style("")),
        ("step 4 is that of a run's checkpoint", lambda: base.style(PAIR / "style_a.safetensors", step=4)),
        ("'style' is no style", lambda: base.stylize("x", ["style"])),
        ("there is no style", lambda: base.generate("x", strengths=[1])),
        ("no style was given; give one of", lambda: base.stylize("x", [])),
        ("no basis is attached", lambda: base.style(base.attach(golden_dir() / "basis_a.safetensors").mix(0))),
    ]:
        with pytest.raises(UserError, match=said):
            call()
    assert "style_a.safetensors comes without style words" in capsys.readouterr().out
