"""The published basis format: golden files through our form and back, configs, and bases that don't fit."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import yaml
from flax import nnx
from golden import golden_dir

from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.formats import basis_file
from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone

CASES = ["a", "c", "e"]


def published(case: str) -> dict:
    return json.loads((golden_dir() / "configs.json").read_text())[case]


def layers() -> dict:
    config = json.loads((golden_dir() / "tiny_pipeline" / "transformer" / "config.json").read_text())
    return backbone(FluxConfig.from_json(config)).adapted


@pytest.fixture
def folder(tmp_path):
    """basis_a with its config.yaml as the published code writes one."""
    (tmp_path / "basis.safetensors").write_bytes((golden_dir() / "basis_a.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": {"process": [{"network": published("a")}]}}))
    return tmp_path


@pytest.mark.parametrize("file", [*(f"basis_{case}" for case in CASES), "basis_a_fp16"])
def test_round_trip_is_byte_equal(file, tmp_path):
    """Golden file -> Basis -> file: the same keys, shapes, dtypes and bytes."""
    source = golden_dir() / f"{file}.safetensors"
    config, arrays = basis_file.read_basis(source, layers=layers())
    basis = Basis.from_arrays(config, arrays)
    basis_file.write_basis(tmp_path / "basis.safetensors", config, basis.to_arrays())
    ours, theirs = safetensors.numpy.load_file(tmp_path / "basis.safetensors"), safetensors.numpy.load_file(source)
    assert ours.keys() == theirs.keys() and len(theirs) == 184
    for key, array in theirs.items():
        assert ours[key].shape == array.shape and ours[key].dtype == array.dtype, key
        assert ours[key].tobytes() == array.tobytes(), key
    assert basis_file.read_basis(tmp_path)[0] == config


def test_every_adapted_layer_is_there():
    """targets.txt lists the golden model's 46 layers with their widths, in the published names."""
    targets = [line.split() for line in (golden_dir() / "targets.txt").read_text().splitlines() if line.strip()]
    assert len(targets) == 46
    _, arrays = basis_file.read_basis(golden_dir() / "basis_a.safetensors")
    names = {basis_file.layer_name(path, block) for path, parts in arrays.items() for block in range(len(parts["a"]))}
    assert names == {target[0].removeprefix("transformer.") for target in targets}
    raw = safetensors.numpy.load_file(golden_dir() / "basis_a.safetensors")
    np.testing.assert_array_equal(
        arrays["transformer_blocks.ff.net_0_proj"]["b"][1], raw["transformer.transformer_blocks.1.ff.net.0.proj.lora_B"]
    )


@pytest.mark.parametrize("case", ["a", "b", "c", "e"])
def test_config_words(case):
    """The published config's words, to BasisConfig and back; b differs from a in words only."""
    _, arrays = basis_file.read_basis(golden_dir() / f"basis_{case.replace('b', 'a')}.safetensors")
    words = published(case)
    config = basis_file.config_from_network(words, arrays)
    assert (config.size, config.rank, config.key_dim) == (8, 4, 16)
    assert config.activation == ("tanh" if case == "b" else "softmax")
    assert (config.heads, config.reduction) == ((4, "sum") if case == "c" else (1, "mean"))
    assert (config.query, config.query_dim) == (("internal", None) if case == "e" else ("external", 72))
    back = basis_file.network_from_config(config)
    assert back["linear"] == words["linear"]
    assert words["network_kwargs"].items() <= back["network_kwargs"].items()


def test_full_size_count():
    """N = 32, r = 4, k = 128, q = 2304 on the real model: the published checkpoint's 835,051,520 parameters."""
    config = BasisConfig()
    shapes = nnx.state(nnx.eval_shape(lambda: Basis(config, backbone(FluxConfig()).adapted, rngs=nnx.Rngs(0))))
    sizes = [np.prod(variable.shape, dtype=np.int64) for _, variable in nnx.to_flat_state(shapes)]
    assert sum(sizes) == 835_051_520


def test_without_config_a_sentence_says_what_was_taken(capsys):
    config, _ = basis_file.read_basis(golden_dir() / "basis_a.safetensors")
    assert (config.size, config.rank, config.heads, config.query_dim) == (8, 4, 1, 72)
    assert "no config.yaml" in capsys.readouterr().err
    assert basis_file.read_basis(golden_dir() / "basis_e.safetensors")[0].query == "internal"


def test_scale_goes_into_b(tmp_path):
    config, arrays = basis_file.read_basis(golden_dir() / "basis_a.safetensors")
    basis_file.write_basis(tmp_path / "b.safetensors", dataclasses.replace(config, scale=0.5), arrays, np.float32)
    read = basis_file.read_basis(tmp_path)[1]
    path = "single_transformer_blocks.proj_out"
    np.testing.assert_array_equal(read[path]["b"], 0.5 * arrays[path]["b"])
    np.testing.assert_array_equal(read[path]["a"], arrays[path]["a"])


def test_projection_none(tmp_path):
    config, arrays = basis_file.read_basis(golden_dir() / "basis_a.safetensors")
    arrays = {
        path: {part: array for part, array in parts.items() if part != "projection"} for path, parts in arrays.items()
    }
    config = dataclasses.replace(config, projection="none", query_dim=16, query_mode="ca'-ca")
    basis_file.write_basis(tmp_path / "b.safetensors", config, arrays)
    assert len(safetensors.numpy.load_file(tmp_path / "b.safetensors")) == 3 * 46
    assert basis_file.read_basis(tmp_path)[0] == config


def rewritten(folder, change) -> None:
    tensors = safetensors.numpy.load_file(folder / "basis.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "basis.safetensors")


KEY = "transformer.transformer_blocks.1.attn.to_out.0."
BAD_TENSORS = {
    "n": (
        lambda t: t.update({KEY + "lora_keys": np.zeros((7, 16), np.float32)}),
        r"lora_keys of transformer_blocks.1.attn.to_out.0 is \[7, 16\], but \[8, 16\]",
    ),
    "one block": (lambda t: t.pop(KEY + "lora_A"), "to_out.0 has .* with the number of blocks = "),
    "foreign": (lambda t: t.update({"lora_te.x": np.zeros(2)}), 'holds "lora_te.x"'),
    "ordinary": (
        lambda t: (t.clear(), t.update({KEY + "lora_A.weight": np.zeros((2, 2))})),
        "is a LoRA in diffusers' names, not a LoRWeB basis",
    ),
    "axes": (
        lambda t: t.update({k: a[0] for k, a in t.items() if "to_out.0.lora_A" in k}),
        "to_out.0 has lora_A .*expected axes n,i,r",
    ),
    "outside": (
        lambda t: t.update({"transformer.proj_out.lora_A": np.zeros((8, 4, 4))}),
        'holds "transformer.proj_out.lora_A"',
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name, folder):
    change, message = BAD_TENSORS[name]
    rewritten(folder, change)
    with pytest.raises(UserError, match=message):
        basis_file.read_basis(folder)


def test_a_basis_of_another_width_or_rank(folder):
    other = FluxConfig(
        num_layers=2, num_single_layers=3, num_attention_heads=2, attention_head_dim=32, axes_dims_rope=(8, 12, 12)
    )
    with pytest.raises(UserError, match=r"blocks of width 128 -> \d+, the model has . blocks of width 64"):
        basis_file.read_basis(folder, layers=backbone(other).adapted)
    with pytest.raises(UserError, match="the model has 1 blocks"):
        basis_file.read_basis(
            folder, layers={path: dataclasses.replace(layer, depth=1) for path, layer in layers().items()}
        )

    def halve(tensors):
        for key in [key for key in tensors if "proj_mlp" in key and "lora_A" in key or "proj_mlp.lora_B" in key]:
            tensors[key] = tensors[key][..., :2] if "lora_A" in key else tensors[key][:, :2]

    rewritten(folder, halve)
    with pytest.raises(UserError, match=r"single_transformer_blocks.0.proj_mlp has \(n, r, k\) = \(8, 2, 16\)"):
        basis_file.read_basis(folder)


def test_bad_configs(folder):
    def rewrite(change):
        words = published("a")
        change(words)
        (folder / "config.yaml").write_text(yaml.safe_dump({"config": {"process": [{"network": words}]}}))

    for change, message in [
        (
            lambda words: words["network_kwargs"].update(only_if_contains=["x"], dropout=1),
            '"dropout", "only_if_contains"',
        ),
        (lambda words: words.update(linear=8), "rank = 8, but the tensors have 4"),
        (lambda words: words["network_kwargs"].update(loras_num=32), "size = 32, but the tensors have 8"),
        (lambda words: words["network_kwargs"].update(query_projection_type="none"), "projection = none"),
        (
            lambda words: words["network_kwargs"].update(mixing_coeffs_type="max"),
            "mixing_coeffs_type is \"max\", expected 'mean' or 'sum'",
        ),
        (lambda words: words.pop("network_kwargs"), r"config.process\[0\].network: network_kwargs is missing"),
        (lambda words: words.update(linear="four"), 'linear is "four", expected a whole number'),
        (lambda words: words.update(linear=True), "linear is true, expected a whole number"),
        (lambda words: words["network_kwargs"].update(lora_heads="x"), 'lora_heads is "x", expected a whole'),
        (lambda words: words["network_kwargs"].update(lora_keys_dim=-1), "lora_keys_dim is -1, expected from 1"),
        (lambda words: words["network_kwargs"].update(lora_softmax=1), "lora_softmax is 1, expected true or"),
        (lambda words: words["network_kwargs"].update(query_mode=[1]), r"query_mode is \[1\], expected text"),
        (lambda words: words["network_kwargs"].update(query_mode="x"), "query mode 'x' is not known"),
    ]:
        rewrite(change)
        with pytest.raises(UserError, match=message):
            basis_file.read_basis(folder)
    (folder / "config.yaml").write_text("config: [unclosed")
    with pytest.raises(UserError, match="not valid YAML"):
        basis_file.read_basis(folder)
    with pytest.raises(UserError, match="does not exist"):
        basis_file.read_basis(folder, folder / "absent.yaml")


def test_two_bases_do_not_share_one_config(folder):
    config, arrays = basis_file.read_basis(folder)
    basis_file.write_basis(folder / "twin.safetensors", config, arrays)
    with pytest.raises(UserError, match="a folder of its own"):
        basis_file.write_basis(folder / "other.safetensors", dataclasses.replace(config, heads=2), arrays)
    with pytest.raises(UserError, match="ordinary LoRA"):
        basis_file.write_basis(folder / "b.safetensors", BasisConfig(size=1, query="fixed"), arrays)
