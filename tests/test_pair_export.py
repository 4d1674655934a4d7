"""Adapters of Pair Customization exported, and taken up by a basis, against torch, diffusers and formulas in numpy."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from golden import INPUTS, golden_dir

from lorweb_jax import Basis, Pipeline, UserError, edit, export, read_image, stylize, write_image
from lorweb_jax.adapters import pair
from lorweb_jax.adapters.append import append
from lorweb_jax.adapters.formats import pair_file
from lorweb_jax.adapters.formats.basis_file import read_basis
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.styles import Styles, load_style, weighted

FOLDER, PAIR = golden_dir() / "tiny_pipeline", golden_dir() / "pair"
LAYERS = backbone(FluxConfig.from_json(json.loads((FOLDER / "transformer" / "config.json").read_text()))).adapted


def run(*arguments) -> None:
    export.main([str(argument) for argument in arguments])


def of_pair(*arguments) -> None:
    run("pair", *arguments, "--pipeline", FOLDER)


@pytest.fixture(scope="module")
def velocity():
    """diffusers' velocity for case d's inputs, with a LoRA's file loaded by its own pipeline class."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    case = np.load(PAIR / "forward_d.npz")
    inputs = {name: torch.tensor(case[name]) for name in INPUTS}
    others = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    model = diffusers.FluxTransformer2DModel.from_pretrained(FOLDER / "transformer").eval()
    pipeline = diffusers.FluxKontextPipeline(transformer=model, **others)

    def of(path):
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
        with torch.no_grad():
            found = model(**inputs, return_dict=False)[0].numpy()
        pipeline.unload_lora_weights()
        return found

    return of, case


def relative(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "which, sources, options",
    [
        ("style", ["style_d"], []),
        ("content", ["content_d"], ["--alpha", "8"]),
        ("both", ["content_d", "style_d"], []),
        ("both", ["content_d", "style_d"], ["--format", "kohya"]),
        ("style", ["style_d"], ["--format", "comfyui", "--alpha"]),
        ("both", ["content_d", "style_d"], ["--format", "published"]),
    ],
)
def test_diffusers_gives_the_recorded_velocity(velocity, tmp_path, which, sources, options):
    """Adapters on some blocks only: what the published code computed, to a relative error of 1e-5."""
    of, case = velocity
    out = tmp_path / "x.safetensors"
    of_pair(*(PAIR / f"{name}.safetensors" for name in sources), out, *options)
    read = out
    if {"kohya", "comfyui"} & {*options}:  # diffusers reads these at FLUX.1's own width alone
        run("lora", out, read := tmp_path / "again.safetensors", "--pipeline", FOLDER)
    assert relative(of(read), case[which]) <= 1e-5 < relative(case["none"], case[which])
    names = "".join(safetensors.numpy.load_file(out))
    if which == "style":  # on odd blocks
        assert "blocks.1." in names and "blocks.0." not in names and "blocks.2." not in names


def test_published_files_keep_their_bytes(tmp_path):
    """Whatever they are stored in, from a file and from the folder that both lie in."""
    member = pair_file.read_member(PAIR / "style_a.safetensors", LAYERS)
    for dtype in (np.float32, ml_dtypes.bfloat16):
        (folder := tmp_path / np.dtype(dtype).name).mkdir()
        pair_file.write_member(folder / "style_lora.safetensors", member, dtype)
        pair_file.write_member(folder / "content_lora.safetensors", member, dtype)
        for source in (folder, folder / "style_lora.safetensors"):
            of_pair(source, folder / "out.safetensors", "--format", "published", "--overwrite")
            assert (folder / "out.safetensors").read_bytes() == (folder / "style_lora.safetensors").read_bytes()
    of_pair(PAIR / "style_a.safetensors", tmp_path / "a.safetensors", "--format", "published")
    assert (tmp_path / "a.safetensors").read_bytes() == (PAIR / "style_a.safetensors").read_bytes()


def test_a_lora_of_lower_rank_says_its_error(tmp_path, capsys):
    of_pair(PAIR / "style_a.safetensors", tmp_path / "x.safetensors", "--rank", "2", "--dtype", "float16")
    assert "rank 2: the update is off by" in (said := capsys.readouterr().out) and "rank 2, " in said
    tensors = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float16)}


def test_exported_styles_are_styles(tmp_path):
    """An ordinary LoRA of a style guides as the published file does, and keeps words in its header."""
    of_pair(PAIR / "style_d.safetensors", tmp_path / "x.safetensors")
    one, other = (
        load_style(path, LAYERS, words="").member for path in (tmp_path / "x.safetensors", PAIR / "style_d.safetensors")
    )
    assert one.blocks == other.blocks and one.rank == other.rank
    for path in other.a:
        np.testing.assert_array_equal(one.a[path], other.a[path])
        np.testing.assert_array_equal(one.b[path], other.b[path])


def test_an_exported_content_is_no_style(tmp_path):
    """Whatever its file is called; summed with a style it is one."""
    files = [PAIR / "content_a.safetensors", PAIR / "style_a.safetensors"]
    of_pair(files[0], tmp_path / "x.safetensors", "--format", "comfyui")
    with pytest.raises(UserError, match="x.safetensors is by its name or header a content adapter"):
        load_style(tmp_path / "x.safetensors", LAYERS)
    of_pair(*files, tmp_path / "both.safetensors")
    assert load_style(tmp_path / "both.safetensors", LAYERS, words="").name == "both"


def test_styles_saved_from_python(tmp_path):
    """Two styles summed at their weights; a single one in the published format keeps its bytes."""
    pipeline = Pipeline.load(FOLDER)
    files = [PAIR / "style_a.safetensors", PAIR / "style_d.safetensors"]
    styles = [pipeline.style(file, words="in ink", weight=weight) for file, weight in zip(files, (0.5, -1))]
    pipeline.save_style(tmp_path / "sum.safetensors", styles)
    found = load_style(tmp_path / "sum.safetensors", LAYERS, words="").member
    for path in found.a:
        parts = (weighted(style) for style in styles)
        expected = sum(part.a[path].transpose(0, 2, 1) @ part.b[path] for part in parts if path in part.a)
        update = found.a[path].transpose(0, 2, 1) @ found.b[path]
        np.testing.assert_allclose(update, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    pipeline.save_style(tmp_path / "one.safetensors", styles[0], names="kohya", alpha=2)
    assert load_style(tmp_path / "one.safetensors", LAYERS).words == "in ink"
    plain = pipeline.style(files[0], words="")
    pipeline.save_style(tmp_path / "published.safetensors", plain, names="published")
    assert (tmp_path / "published.safetensors").read_bytes() == files[0].read_bytes()
    pipeline.save_style(tmp_path / "one.safetensors", plain)  # replaces an earlier result
    with pytest.raises(UserError, match="one.safetensors, which is one of the inputs; give another name"):
        pipeline.save_style(tmp_path / "one.safetensors", [plain, pipeline.style(tmp_path / "one.safetensors")])
    with pytest.raises(UserError, match="names is 'xlabs'; give diffusers, kohya, comfyui or published"):
        pipeline.save_style(tmp_path / "x.safetensors", plain, names="xlabs")


def test_exports_refuse(tmp_path):
    plain = tmp_path / "plain.safetensors"
    rng = np.random.default_rng(0)
    layers = [f"transformer.transformer_blocks.1.attn.to_{part}" for part in "qk"]
    shapes = {"lora_A": (4, 128), "lora_B": (128, 4)}
    tensors = {
        f"{layer}.{side}.weight": rng.normal(size=shape).astype(np.float32)
        for layer in layers
        for side, shape in shapes.items()
    }
    safetensors.numpy.save_file(tensors, plain)
    modulation = tmp_path / "modulation.safetensors"
    name = "transformer.single_transformer_blocks.2.norm.linear"
    safetensors.numpy.save_file(
        {
            f"{name}.lora_A.weight": np.ones((4, 128), np.float32),
            f"{name}.lora_B.weight": np.ones((384, 4), np.float32),
        },
        modulation,
    )
    out, published = tmp_path / "out.safetensors", ["--format", "published"]
    style = PAIR / "style_a.safetensors"
    for said, arguments in [
        (r"transformer_blocks\.1\.attn\.to_k has another A than .*to_q; in this format", [plain, out, *published]),
        (
            r"single_transformer_blocks\.2\.norm\.linear has an update, and this format has no name",
            [modulation, out, *published],
        ),
        ("no place for an alpha", [style, out, *published, "--alpha"]),
        ("no A that q, k and v share", [style, out, *published, "--rank", "2"]),
        ("is a LoRWeB basis, and a style is a single adapter", [golden_dir() / "basis_a.safetensors", out]),
        ("must end in .safetensors", [style, tmp_path / "x.bin"]),
        ("one of the inputs", [plain, plain, "--overwrite"]),
        ("plain.safetensors was given twice; adapters are summed, each once", [plain, plain, out]),
        ("holds no content, only style", [style, out, "--which", "content"]),
        ("step 3 is that of a run's checkpoint", [style, out, "--step", "3"]),
        ("rank is 9; it must be from 1 to 4", [style, out, "--rank", "9"]),
        ("holds no style|there is no", [tmp_path / "none", out]),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            of_pair(*arguments)
        assert "\n" not in str(caught.value) and not out.exists()
    with pytest.raises(UserError, match="without|has no|only content"):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "content_lora.safetensors").write_bytes((PAIR / "content_a.safetensors").read_bytes())
        of_pair(tmp_path / "folder", out)


# Styles as members of a basis, analogies as styles


@pytest.fixture(scope="module")
def basis():
    config, arrays = read_basis(golden_dir() / "basis_a.safetensors", None, LAYERS)
    return config, arrays


@pytest.fixture(scope="module")
def member():
    return load_style(PAIR / "style_d.safetensors", LAYERS, words="").member


def update(adapters, path, block, x):
    adapter = adapters[path]
    a, b, c = adapter.a_nir[block], adapter.b_nro[block], adapter.coeff_bn[block]
    factors = (np.asarray(part, np.float64) for part in (a, c[0], b))
    return np.einsum("si,nir,n,nro->so", x, *factors, optimize=True) * adapter.scale


def test_appended_members_add_up_with_the_routers(basis, member):
    """scale · Σ c_n A_n B_n + w B A, in float64; the router's coefficients are as before, to the bit."""
    config, arrays = basis
    for scale in (1.0, 0.5):
        before = Basis.from_arrays(dataclasses.replace(config, scale=scale), arrays)
        both = Basis.from_arrays(*append(before.config, arrays, {"ink": member}, LAYERS))
        query = jnp.asarray(np.random.default_rng(0).normal(size=(1, config.query_dim)), jnp.float32)
        c, more = before.coefficients(query), both.coefficients(query)
        for path in c:
            np.testing.assert_array_equal(more[path][..., : config.size], c[path])
            assert not np.asarray(more[path][..., config.size :]).any()
        mix = both.mix({path: np.asarray(array[:, 0]) for path, array in more.items()}) + 0.8 * both.mix("ink")
        adapters = both.adapters({path: jnp.asarray(array)[:, None] for path, array in mix.coefficients.items()})
        for path in (
            "transformer_blocks.attn.to_k",
            "single_transformer_blocks.proj_out",
            "transformer_blocks.ff.net_2",
        ):
            x = np.random.default_rng(1).normal(size=(3, LAYERS[path].inputs))
            for block in range(LAYERS[path].depth):
                expected = update(before.adapters(c), path, block, x)
                if path in member.a:
                    expected = expected + 0.8 * (x @ member.a[path][block].T) @ member.b[path][block]
                np.testing.assert_allclose(
                    update(adapters, path, block, x), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
                )


def test_appended_members_are_named_and_kept(basis, member, tmp_path, capsys):
    """Twice, by the command, into a run's folder; what cannot hold them refuses."""
    run(
        "append",
        golden_dir() / "basis_a.safetensors",
        PAIR / "style_d.safetensors",
        PAIR / "style_b.safetensors",
        tmp_path / "run",
        "--names",
        "ink",
        "wash",
        "--pipeline",
        FOLDER,
    )
    assert "with ink, wash for edit --member" in capsys.readouterr().out
    config, arrays = load_basis(tmp_path / "run", LAYERS)
    assert config.appended == (("ink", 1), ("wash", 1)) and config.size == basis[0].size + 2
    both = Basis.from_arrays(config, arrays)
    assert [int(row[0].sum()) for row in both.mix("wash").coefficients.values()] == [1] * len(arrays)
    with pytest.raises(UserError, match="there is no mix 'oil' in this basis; it has ink, wash"):
        both.mix("oil")
    with pytest.raises(UserError, match="a member or a mix ink already"):
        append(config, arrays, {"ink": member}, LAYERS)
    with pytest.raises(UserError, match="appended members .ink, wash. without router keys"):
        run("published", tmp_path / "run", tmp_path / "x.safetensors")
    internal = read_basis(golden_dir() / "basis_e.safetensors", None, LAYERS)
    with pytest.raises(UserError, match="one of the --names is ' '"):
        run("append", "basis", "ink", tmp_path / "none", "--names", " ", "--pipeline", FOLDER)
    with pytest.raises(UserError, match="internal query.*guide its edits by the style"):
        append(*internal, {"ink": member}, LAYERS)
    wide = pair.summed([member] * 3)
    config, arrays = append(*basis, {"wide": wide}, LAYERS)
    assert config.appended == (("wide", 3),) and config.rank == basis[0].rank


def test_a_lora_takes_up_members(member):
    """A basis without a router, on fewer layers than the style."""
    config, arrays = load_basis(PAIR / "style_b.safetensors", LAYERS)
    some = {path: parts for path, parts in arrays.items() if "to_out" in path}
    both = Basis.from_arrays(*append(config, some, {"ink": member}, LAYERS))
    alone, default = both.mix("ink"), both.mix(both.config.coefficients.default)
    for path in both.layers:
        assert alone.coefficients[path][0].tolist() == [0, 1, 1] and default.coefficients[path][0].tolist() == [1, 0, 0]
        assert both.layers[path].a[:, 0].any() == (path in some)
    with pytest.raises(UserError, match="a member or a mix all already"):  # the LoRA's own mix, by default
        append(config, arrays, {"all": member}, LAYERS)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "a2", "b")):
        write_image(f"{name}.png", np.random.default_rng(number).integers(0, 255, (16, 16, 3), np.uint8))
    return ["--a", "a.png", "--a2", "a2.png", "--b", "b.png"]


def test_commands_bridge_bases_and_styles(images, monkeypatch, quick_compiles):
    """An analogy frozen into a style, over the basis's own edit of it: at strength 1, without true guidance, its mix
    twice. And a style that the basis took up: the edit with its coefficient is that of the mix."""
    monkeypatch.setattr(Pipeline, "load", functools.cache(Pipeline.load))
    basis, common = golden_dir() / "basis_a.safetensors", ["--pipeline", str(FOLDER), "--steps", "1"]
    pictures = [read_image(name) for name in images[1::2]]
    run("lora", basis, "frozen.safetensors", *images, "--pipeline", FOLDER)
    style = ["--style", "frozen.safetensors:1:", "--true-guidance", "1", "--style-start", "0"]
    stylize.main([*common, *images, *style, "--basis", str(basis), "--out", "twice.png"])
    pipeline = Pipeline.load(FOLDER).attach(basis)
    mix = pipeline.coefficients(*pictures)
    expected = pipeline.edit(*pictures, steps=1, guidance=1.0, mix=2 * mix)
    assert np.abs(read_image("twice.png").astype(int) - expected).max() <= 1
    # From Python the mix itself is the style.
    frozen = Styles([pipeline.style(mix)], LAYERS).basis
    expected = load_style(Path("frozen.safetensors"), LAYERS, words="").member
    for path, parts in frozen.to_arrays().items():
        np.testing.assert_array_equal(np.asarray(parts["b"])[:, 0], expected.b[path])

    run("append", basis, PAIR / "style_a.safetensors", "both", "--names", "ink", "--pipeline", FOLDER)
    both = pipeline.append(pipeline.style(PAIR / "style_a.safetensors", words="", name="ink"))
    mixes = []
    monkeypatch.setattr(Pipeline, "edit_batch", lambda *arguments, mix, **_: mixes.extend(mix) or [pictures[0]])
    monkeypatch.setattr(
        Pipeline, "session", lambda self, mix, **_: mixes.append(mix) or contextlib.nullcontext(Drawn())
    )
    options = [*common, "--basis", "both", "--member", "ink:-0.5", "--out"]
    edit.main([*options, "edited.png", *images])
    edit.main([*options, "drawn.png", "--prompt", "a dog"])
    assert len(mixes) == 2
    for mix, expected in zip(mixes, (both.coefficients(*pictures) - 0.5 * both.mix("ink"), -0.5 * both.mix("ink"))):
        assert mix.basis == expected.basis
        assert all(np.array_equal(mix.coefficients[path], c) for path, c in expected.coefficients.items())
    for said, members in (
        ("both has taken up no member 'oil', only ink", ["oil:1"]),
        ("--member ink was given 2 times", ["ink:1", "ink:2"]),
    ):
        with pytest.raises(UserError, match=said):
            edit.main([*common, "--basis", "both", "--out", "refused.png", *images, "--member", *members])


class Drawn:
    """A session that draws nothing."""

    def generate(self, *_, **__):
        return np.zeros((16, 16, 3), np.uint8)
