"""A run of Pair Customization read from its folder: its members and words, and what is refused."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden import golden_dir

from lorweb_jax import export
from lorweb_jax.adapters.basis import Basis
from lorweb_jax.adapters.formats.pair_file import read_member
from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.pipeline.adapters import load_basis
from lorweb_jax.pipeline.pair_run import make_members, members_of_run, words_of_run
from lorweb_jax.pipeline.styles import load_style
from lorweb_jax.runs import checksums

FOLDER = golden_dir() / "pair"
LAYERS = backbone(
    FluxConfig.from_json(json.loads((golden_dir() / "tiny_pipeline" / "transformer" / "config.json").read_text()))
).adapted
BLOCKS = {f"{kind}_{member}": "all" for kind in ("double", "single") for member in ("content", "style")}
PAIR = {"content_rank": 4, "style_rank": 3, "orthogonal": True, **BLOCKS}


@pytest.fixture
def workdir(tmp_path):
    """A run's folder with one checkpoint, that holds the adapters content_a and style_b."""
    members = make_members(PAIR, LAYERS)
    for name, file in (("content", "content_a"), ("style", "style_b")):
        members.fill(name, read_member(FOLDER / f"{file}.safetensors", LAYERS))
    arrays = {".".join(("members", *key)): np.asarray(value[...]) for key, value in members.parameters().items()}
    parts = {
        part: {name: array for name, array in arrays.items() if name.endswith(".a") == frozen}
        for part, frozen in (("trainable", False), ("constants", True))
    }
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(parts)))
    checksums.write(tmp_path / "checkpoints" / "7")
    config = {
        "job": "pair",
        "train": {"ema": 0.0},
        "pair": PAIR,
        "data": {"caption": "a sbu dog", "style_words": "in pastels"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_members_and_words_of_a_run(workdir):
    members = members_of_run(workdir, LAYERS)
    assert list(members) == ["content", "style"] and members_of_run(workdir, LAYERS, step=7).keys() == members.keys()
    for name, file in (("content", "content_a"), ("style", "style_b")):
        expected = read_member(FOLDER / f"{file}.safetensors", LAYERS)
        assert members[name].blocks == expected.blocks and members[name].rank == expected.rank
        for path in expected.a:
            np.testing.assert_array_equal(members[name].a[path], expected.a[path])
            np.testing.assert_array_equal(members[name].b[path], expected.b[path])
    words = words_of_run(workdir)
    assert words == ("a sbu dog", "in pastels") and words.stylised == "a sbu dog in pastels"


def test_a_runs_style_knows_its_words(workdir, tmp_path_factory):
    """As stylize reads it, and what export writes of it: both adapters in the published format, and words in a LoRA."""
    style = load_style(workdir, LAYERS)
    assert style.words == "in pastels" and style.name == workdir.name and style.strength == 6
    assert load_style(workdir, LAYERS, words="", step=7).words == ""
    out = tmp_path_factory.mktemp("out")
    pipeline = ["--pipeline", str(golden_dir() / "tiny_pipeline")]
    export.main(["pair", str(workdir), str(out / "style.safetensors"), *pipeline])
    assert load_style(out / "style.safetensors", LAYERS).words == "in pastels"
    for which, file in (("content", "content_a"), ("style", "style_b")):
        path = out / f"{which}_published.safetensors"
        export.main(["pair", str(workdir), str(path), "--format", "published", "--which", which, *pipeline])
        assert path.read_bytes() == (FOLDER / f"{file}.safetensors").read_bytes()


def test_a_run_is_a_basis_of_its_adapters(workdir, capsys):
    """Its mixes by name: style, the default, content and both."""
    basis = Basis.from_arrays(*load_basis(workdir, LAYERS))
    assert "as a basis its mix 'style' takes part in full and without style guidance" in capsys.readouterr().out
    rows = {name: basis.mix(name).coefficients for name in ("style", "content", "both")}
    assert basis.config.coefficients.default == "style"
    for path, parts in basis.to_arrays().items():
        for name, file in (("style", "style_b"), ("content", "content_a")):
            expected = read_member(FOLDER / f"{file}.safetensors", LAYERS)
            a, b = (np.einsum("ln,ln...->l...", rows[name][path], parts[side]) for side in "ab")
            update = expected.a[path].transpose(0, 2, 1) @ expected.b[path]
            np.testing.assert_allclose(a @ b, update, rtol=0, atol=1e-6 * np.abs(update).max())
        np.testing.assert_array_equal(rows["both"][path], rows["style"][path] + rows["content"][path])


def test_runs_that_hold_no_such_pair_are_refused(workdir):
    with pytest.raises(UserError, match=r"no checkpoint of step 8; it has \[7\]"):
        members_of_run(workdir, LAYERS, step=8)
    other = FluxConfig(num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=128)
    with pytest.raises(
        UserError, match=r"has \[3, 128, 4\] as content\.single_transformer_blocks\.attn.*give the base model"
    ):
        members_of_run(workdir, backbone(other).adapted)
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "young").mkdir()
    (workdir / "young" / "config.json").write_text(json.dumps(config))  # broken off before its first checkpoint
    for read in (load_basis, load_style):
        with pytest.raises(UserError, match="young holds no complete checkpoint; train for longer"):
            read(workdir / "young", LAYERS)
    (workdir / "config.json").write_text(json.dumps(config | {"job": "basis"}))
    for read in (words_of_run, lambda folder: members_of_run(folder, LAYERS)):
        with pytest.raises(UserError, match="is a run of the job 'basis', which trains no pair"):
            read(workdir)


def test_members_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="ranks 100 and 29 need 129 orthonormal rows.*only 128 wide"):
        make_members(PAIR | {"content_rank": 100, "style_rank": 29}, LAYERS)
    make_members(PAIR | {"content_rank": 100, "style_rank": 29, "orthogonal": False}, LAYERS)
    with pytest.raises(UserError, match="config.pair.style_rank is 129, but .* have 128 inputs"):
        make_members(PAIR | {"style_rank": 129, "orthogonal": False}, LAYERS)
    with pytest.raises(UserError, match="config.pair.single_style names block 7, but there are 3"):
        make_members(PAIR | {"single_style": "7"}, LAYERS)
    with pytest.raises(UserError, match="names no block for either adapter"):
        make_members(PAIR | dict.fromkeys(BLOCKS, "none"), LAYERS)
