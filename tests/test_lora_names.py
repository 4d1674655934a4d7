"""LoRAs in every program's names: updates against the file's own factors and against diffusers' and PEFT's loaders."""

import json

import lora_files
import numpy as np
import pytest
from golden import golden_dir
from lora_files import ALPHA, DOWN_UP, SCHEMES, Lora, flat, named, peft_header, relative, write

from lorweb_jax.adapters.formats import lora_file
from lorweb_jax.adapters.formats.layer_names import layer_name
from lorweb_jax.adapters.formats.lora_read import read_lora
from lorweb_jax.common.errors import UserError
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.record import backbone

FULL = backbone(FluxConfig(num_layers=1, num_single_layers=1)).adapted
SMALL = backbone(
    FluxConfig(num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(2, 2, 4))
).adapted


@pytest.fixture(scope="module")
def lora():
    return Lora()


def read(path, layers=FULL) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{diffusers' layer: (A [R, i], B [o, R])} of our reader, the scale in B."""
    config, arrays = read_lora(path, layers)
    assert (config.size, config.query) == (1, "fixed")
    return {
        layer_name(stack, block): (parts["a"][block, 0].T, parts["b"][block, 0].T)
        for stack, parts in arrays.items()
        for block in range(len(parts["a"]))
    }


def diffusers_updates(path, scheme: str, tensors: dict) -> dict:
    """The same of what diffusers' own loader makes of the file, or of its tensors renamed so that it reads them."""
    torch = pytest.importorskip("torch")
    mixin = pytest.importorskip("diffusers.loaders.lora_pipeline").FluxLoraLoaderMixin
    source, where = str(path.parent), {"weight_name": path.name}
    if scheme != "as it is":
        change = {
            "transformer.": lambda key: f"transformer.{key}",
            "attention": lambda key: key,
            "lora_down": lambda key: (
                ("" if key.startswith("diffusion") else "diffusion_model.")
                + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            ),
        }[scheme]
        source = {
            change(key): torch.tensor(array) for key, array in tensors.items() if scheme != "attention" or "attn" in key
        }
        where = {}
    state, alphas = mixin.lora_state_dict(source, return_alphas=True, **where)
    found = {}
    for key in state:
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            a, b = (state[f"{name}.lora_{side}.weight"].numpy() for side in "AB")
            alpha = (alphas or {}).get(f"{name}.alpha")
            found[name.removeprefix("transformer.")] = (a, b if alpha is None else b * (float(alpha) / len(a)))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_import(scheme, lora, tmp_path):
    """Every layer's update, to 1e-6 of its norm: against the factors written, and against diffusers where it reads
    such names."""
    make, scaled, theirs = SCHEMES[scheme]
    tensors = make(lora)
    found = read(write(tmp_path / "x.safetensors", tensors))
    expected = {name: (a, b * (ALPHA / lora.rank if scaled else 1)) for name, (a, b) in lora.layers().items()}
    if scheme == "XLabs":
        kept = ("attn.to_", "attn.add_", "proj_out")
        expected = {name: pair for name, pair in expected.items() if any(part in name for part in kept)}
    assert found.keys() == expected.keys()
    errors = [max(relative(found[name], expected[name]) for name in expected)]
    if theirs:
        oracle = diffusers_updates(tmp_path / "x.safetensors", theirs, tensors)
        assert oracle.keys() == {name for name in expected if theirs != "attention" or ".attn." in name}
        errors.append(max(relative(found[name], oracle[name]) for name in oracle))
    print(
        f"{scheme:24} loads, {len(found)} layers, from the factors {errors[0]:.1e}, from diffusers "
        + (f"{errors[1]:.1e}" if theirs else "(doesn't read it)")
    )
    assert max(errors) <= 1e-6


def test_whole_kontext_lora_of_black_forest_names(tmp_path):
    """All 57 blocks in Black Forest Labs' names behind PEFT's prefix, which diffusers reads in full only: 1e-6."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    lora = Lora(rank=1, blocks=(19, 38))
    tensors = named(lora.fused, "base_model.model.")
    final = {
        f"base_model.model.final_layer.linear.lora_{side}.weight": np.zeros(shape, np.float32)
        for side, shape in (("A", (1, 3072)), ("B", (64, 1)))
    }
    found = read(write(tmp_path / "x.safetensors", tensors | final), backbone(FluxConfig()).adapted)
    state = utils._convert_fal_kontext_lora_to_diffusers(
        {key: torch.tensor(array) for key, array in (tensors | final).items()}
    )
    assert len(found) == 494
    for name, pair in found.items():
        theirs = tuple(state[f"transformer.{name}.lora_{side}.weight"].numpy() for side in "AB")
        np.testing.assert_array_equal(pair[1] @ pair[0][:, :1], theirs[1] @ theirs[0][:, :1])


PATTERNS = dict(
    rank_pattern={"attn.to_k": 3, "^transformer_blocks.0.ff.net.2": 3},
    alpha_pattern={"attn.to_q": 5, "transformer_blocks.0.ff.net.0.proj": 0.5, "proj_mlp": 7},
)


@pytest.mark.parametrize(
    "settings",
    [
        dict(r=2, lora_alpha=4),
        dict(r=2, lora_alpha=4, use_rslora=True),
        dict(r=2, lora_alpha=3.5, **PATTERNS),
        dict(r=2, lora_alpha=3.5, use_rslora=True, **PATTERNS),
    ],
)
@pytest.mark.parametrize("where", ["header", "adapter_config.json"])
def test_settings_of_peft(settings, where, tmp_path):
    """Scales that stand in the header or beside the file: each layer's update as PEFT applies it in diffusers' model,
    to 1e-6."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    folder = golden_dir() / "tiny_pipeline" / "transformer"
    layers = backbone(FluxConfig.from_json(json.loads((folder / "config.json").read_text()))).adapted
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder)
    random, pairs = np.random.default_rng(0), {}
    for path, layer in layers.items():
        i, o = layer.inputs, layer.outputs
        for block in range(layer.depth):
            name = layer_name(path, block)
            rank = 3 if "rank_pattern" in settings and ("attn.to_k" in name or name.endswith("s.0.ff.net.2")) else 2
            pairs[name] = tuple(random.normal(size=size).astype(np.float32) for size in ((rank, i), (o, rank)))
    targets = {"target_modules": list(pairs)}
    if where == "header":
        file = write(
            tmp_path / "x.safetensors",
            named(pairs, "transformer."),
            lora_adapter_metadata=peft_header(**settings, **targets),
        )
        model.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="transformer", adapter_name="x")
    else:
        file = write(tmp_path / "adapter_model.safetensors", named(pairs, "base_model.model."))
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings, **targets}))
        model = peft.PeftModel.from_pretrained(model, tmp_path, adapter_name="x").base_model.model
    found = read(file, layers)
    assert found.keys() == pairs.keys()
    for name, (a, b) in found.items():
        theirs = model.get_submodule(name).get_delta_weight("x").detach().numpy()
        assert np.linalg.norm(b @ a - theirs) <= 1e-6 * np.linalg.norm(theirs), name


GOOD = "transformer.transformer_blocks.0.attn.to_q"
PAIR = {f"{GOOD}.lora_A.weight": np.ones((2, 8), np.float32), f"{GOOD}.lora_B.weight": np.ones((8, 2), np.float32)}


@pytest.mark.parametrize(
    "alpha,message",
    [
        (np.ones(1), None),
        (np.ones(()), None),
        (np.ones((1, 1)), None),
        (np.ones(2), r'alpha" is \[2\], expected one number'),
        (np.array(np.nan), "alpha holds not-a-number"),
        (np.array(np.inf), "alpha holds infinity"),
        (np.array(-1.0), 'alpha" is -1'),
        (np.array(0.0), 'alpha" is 0'),
        (np.ones(0), r'alpha" is \[0\]'),
    ],
)
def test_alphas(alpha, message, tmp_path):
    file = write(tmp_path / "x.safetensors", PAIR | {f"{GOOD}.alpha": alpha.astype(np.float32)})
    if message:
        with pytest.raises(UserError, match=f"x.safetensors: .*{message}"):
            read(file, SMALL)
    else:
        found = read(file, SMALL)[GOOD.removeprefix("transformer.")]
        assert relative(found, (np.ones((2, 8)), np.full((8, 2), 0.5))) < 1e-6


ADAPTERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_w1": "LoKr",
    "hada_w1_a": "LoHa",
    "oft_blocks": "OFT",
    "lora_mid.weight": "Tucker factors",
    "lora_B.bias": "a LoRA bias",
    "diff": "whole differences",
    "diff_b": "whole differences",
    "a1.weight": "GLoRA",
    "on_input": "IA3",
}


@pytest.mark.parametrize("end,name", ADAPTERS.items())
def test_other_adapters_are_named(end, name, tmp_path):
    file = write(tmp_path / "x.safetensors", PAIR | {f"{GOOD}.{end}": np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match=rf"x.safetensors holds {name}.*{GOOD}.{end}"):
        read(file, SMALL)


@pytest.mark.parametrize(
    "change,message",
    [
        ({f"{GOOD}.lora_A.weight": np.full((2, 8), np.nan, np.float32)}, "lora_A.weight holds not-a-number in 16"),
        (
            {f"{GOOD}.lora_B.weight": np.diag([np.inf] * 8)[:, :2].astype(np.float16)},
            "lora_B.weight holds infinity in 2",
        ),
        ({f"{GOOD}.lora_A.weight": np.ones((2, 8), np.int32)}, "numbers of type int32"),
        (
            {
                f"{GOOD}.lora_A.weight": np.ones((0, 8), np.float32),
                f"{GOOD}.lora_B.weight": np.ones((8, 0), np.float32),
            },
            r"lora_A \[0, 8\]",
        ),
        ({f"{GOOD}.lora_A.weight": np.ones((2, 9), np.float32)}, r"lora_A \[2, 9\].*expected \[R, 8\]"),
        ({GOOD.replace("0", "7") + ".lora_A.weight": np.ones((2, 8), np.float32)}, "7.attn.to_q, which the model"),
        ({GOOD.replace("0", "1000000000") + ".lora_A.weight": np.ones((2, 8), np.float32)}, "FLUX.1 hasn't got"),
        ({GOOD.replace("0", "00") + ".lora_A.weight": np.ones((2, 8), np.float32)}, "FLUX.1 hasn't got"),
        ({GOOD + "\n\x1b.lora_A.weight": np.ones((2, 8), np.float32)}, r"\\n\\u001b"),
        ({f"{GOOD[:-1]}k.lora_A.weight": np.ones((2, 8), np.float32)}, "only one of the two factors"),
        ({f"{GOOD}.lora_A.second.weight": np.ones((2, 8), np.float32)}, 'several LoRAs, "", "second"'),
        (
            named({"transformer_blocks_0_attn_to_q": tuple(PAIR.values())}, "lora_transformer_", DOWN_UP),
            "two updates of",
        ),
        ({"transformer.some.layer.lora_A.weight": np.ones((2, 8), np.float32)}, "adapts transformer.some.layer.lora"),
        (
            {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": np.ones((2, 8), np.float32)},
            "LoRA for Stable Diffusion 1, 2 or XL",
        ),
    ],
)
def test_what_cannot_be_applied(change, message, tmp_path):
    with pytest.raises(UserError, match=rf"x.safetensors.*({message})"):
        read(write(tmp_path / "x.safetensors", PAIR | change), SMALL)


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(r=2, lora_alpha=4, use_dora=True), "use_dora set .DoRA"),
        (dict(r=2, lora_alpha=4, lora_bias=True), "lora_bias"),
        (dict(r=4, lora_alpha=4), "has rank 4, but its tensors"),
        (dict(r=2, lora_alpha=4, peft_type="LOHA"), "LOHA"),
        (dict(r="2", lora_alpha=4), r'r is "2", expected a whole number'),
        (dict(r=2, lora_alpha=-1), "lora_alpha is -1"),
        (dict(r=2, lora_alpha=None), "lora_alpha is null"),
        (dict(r=2, lora_alpha=4, bias="all"), "biases"),
        (dict(r=2, lora_alpha=4, init_lora_weights="pissa_niter_4"), "pissa"),
        (dict(r=2, lora_alpha=4, modules_to_save=["x"]), "modules_to_save"),
        (dict(r=2, lora_alpha=4, alpha_pattern={"(a+)+b": 1}), "pattern .*names of layers"),
        (dict(r=2, lora_alpha=4, alpha_pattern=[1]), r"alpha_pattern is \[1\]"),
        (dict(r=0, lora_alpha=4), "r is 0"),
    ],
)
def test_settings_that_are_not_read(settings, message, tmp_path):
    file = write(tmp_path / "x.safetensors", PAIR, lora_adapter_metadata=peft_header(**settings))
    with pytest.raises(UserError, match=f"x.safetensors.*{message}"):
        read(file, SMALL)


def test_two_scales_that_differ(tmp_path):
    header = peft_header(r=2, lora_alpha=4)
    alpha = {f"{GOOD}.alpha": np.array(4, np.float32)}
    assert read(write(tmp_path / "x.safetensors", PAIR | alpha, lora_adapter_metadata=header), SMALL)
    alpha = {f"{GOOD}.alpha": np.array(1, np.float32)}
    with pytest.raises(UserError, match="the scale of .* is 0.5, by .* it is 2"):
        read(write(tmp_path / "x.safetensors", PAIR | alpha, lora_adapter_metadata=header), SMALL)
    with pytest.raises(UserError, match="not valid JSON"):
        read(write(tmp_path / "x.safetensors", PAIR, lora_adapter_metadata="{"), SMALL)


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Text encoders and layers outside the blocks in a line; zeros and a scale of 1 need none."""
    outside = named({"transformer.x_embedder": tuple(PAIR.values())}, "")
    text = {
        f"lora_te{k}_text_model_encoder_layers_0_mlp_fc1.{end}": np.ones((2, 2), np.float32)
        for k in (1, 3)
        for end in DOWN_UP
    }
    read(write(tmp_path / "x.safetensors", PAIR | outside | text), SMALL)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "left out its adapter of CLIP (1 layers); its adapter of T5" in said
    assert "x_embedder, outside the blocks" in said
    zeros = {key: 0 * array for key, array in outside.items()} | {f"{GOOD}.diff_b": np.zeros(8, np.float32)}
    read(write(tmp_path / "x.safetensors", PAIR | zeros, ss_network_alpha="2", ss_network_dim="2"), SMALL)
    assert not capsys.readouterr().out
    read(write(tmp_path / "x.safetensors", PAIR, ss_network_alpha="1", ss_network_dim="2"), SMALL)
    assert "ss_network_alpha = 1, but its layers hold no alpha, so that it is taken" in capsys.readouterr().out


@pytest.mark.parametrize("alpha", [False, True, 0.5])
@pytest.mark.parametrize("names", lora_file.NAMES)
def test_export(names, alpha, lora, tmp_path):
    """Written in each program's names with and without alpha: read back by us (exactly where B isn't divided) and by
    diffusers, the update stays within 1e-6. q, k and v have an A each, one layer has no update."""
    random = np.random.default_rng(1)
    factors = {
        path: lora_file.Factors(
            random.normal(size=(layer.depth, layer.inputs, 2)).astype(np.float32),
            random.normal(size=(layer.depth, 2, layer.outputs)).astype(np.float32),
        )
        for path, layer in FULL.items()
        if path != "transformer_blocks.attn.to_k"
    }
    file = tmp_path / "x.safetensors"
    lora_file.write_lora(file, factors, alpha=alpha, names=names, layers=FULL)
    expected = {
        layer_name(path, block): (a[block].T, b[block].T) for path, (a, b) in factors.items() for block in range(len(a))
    }
    found, oracle = read(file), diffusers_updates(file, "as it is", {})
    for name, pair in expected.items():
        if alpha is not True and alpha:
            assert relative(found[name], pair) <= 1e-6
        else:
            assert all((ours == theirs).all() for ours, theirs in zip(found[name], pair)), name
        assert relative(oracle[name], pair) <= 1e-6
    assert all(not (b @ a).any() for name, (a, b) in found.items() if name not in expected)
    error = max(relative(oracle[name], pair) for name, pair in expected.items())
    print(f"{names}, alpha {alpha}: read back by diffusers, {error:.1e}")


def test_export_keeps_a_shared_factor(lora, tmp_path):
    """kohya's file in, kohya's file out: the same ranks, and to the bit where alpha = R."""
    tensors = named(lora.fused, "lora_unet_", DOWN_UP, flat, lora.rank)
    _, arrays = read_lora(write(tmp_path / "x.safetensors", tensors), FULL)
    ones = {path: np.ones(parts["a"].shape[:2]) for path, parts in arrays.items()}
    lora_file.write_lora(tmp_path / "y.safetensors", lora_file.mixed_factors(arrays, ones), names="kohya", layers=FULL)
    again = lora_files.safetensors.numpy.load_file(tmp_path / "y.safetensors")
    assert again.keys() == tensors.keys()
    assert all((again[key] == array).all() for key, array in tensors.items())


@pytest.mark.parametrize("alpha,dtype", [(1e6, np.float16), (1e38, np.float32), (1e300, np.float32)])
def test_an_alpha_that_leaves_no_precision(alpha, dtype, tmp_path):
    """Below the smallest normal number, or beyond the largest, the update would no longer be the same."""
    factors = {
        "transformer_blocks.attn.to_q": lora_file.Factors(
            np.ones((1, 4, 2), np.float32), np.full((1, 2, 4), 1e-2, np.float32)
        )
    }
    with pytest.raises(UserError, match="full precision|infinity"):
        lora_file.write_lora(tmp_path / "x.safetensors", factors, dtype, alpha)
    assert not list(tmp_path.iterdir())
