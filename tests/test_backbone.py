"""The record of a backbone: FLUX.1's against its module, and a made-up one of another kind, by all that reads it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.fold import fold
from lorweb_jax.models.backbone import Backbone, Latents, Linear, References
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.nn import layers as nn_layers
from lorweb_jax.nn import sharding
from lorweb_jax.planning.flops import base_flops, basis_flops

CONFIG = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=20,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=12,
    axes_dims_rope=(4, 6, 10),
)


def linears_of(module: nnx.Module) -> dict[str, tuple]:
    """{path: (kernel's shape, bias's shape or None)} of every linear layer that is somewhere in a module."""
    return {
        ".".join(map(str, path)): (node.kernel.shape, node.bias and node.bias.shape)
        for path, node in nnx.iter_graph(module)
        if isinstance(node, nn_layers.Linear)
    }


def shapes_of(layer: Linear) -> tuple:
    stacked = (layer.depth,) if layer.stack else ()
    return (*stacked, layer.inputs, layer.outputs), (*stacked, layer.outputs) if layer.bias else None


def axes_of(record: Backbone) -> dict[str, sharding.Axes]:
    """{parameter's path: the logical axes that its layer's role gives it}: kernel, a quantised kernel's scale, bias."""
    axes = {}
    for path, layer in record.linears.items():
        kernel, bias = sharding.linear_axes(layer.role)
        axes |= {f"{path}.kernel": kernel, f"{path}.scale": kernel} | ({f"{path}.bias": bias} if layer.bias else {})
    return axes


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}, {"num_layers": 1, "in_channels": 12}], ids=str)
def test_the_record_of_flux_lists_the_modules_linear_layers(changes):
    config = dataclasses.replace(CONFIG, **changes)
    flux = nnx.eval_shape(lambda: Flux(config, rngs=nnx.Rngs(0)))
    assert linears_of(flux) == {path: shapes_of(layer) for path, layer in backbone(config).linears.items()}


def test_parameters_of_flux_have_their_roles_axes():
    flux = nnx.eval_shape(lambda: Flux(CONFIG, quantization="int8", rngs=nnx.Rngs(0)))
    recorded = axes_of(backbone(CONFIG))
    found = {
        ".".join(map(str, path)): sharding.variable_axes(leaf) for path, leaf in nnx.to_flat_state(nnx.state(flux))
    }
    norms = {path for path in found if re.search(r"norm_(added_)?[qk]\.scale$", path)}
    assert {path: axes for path, axes in found.items() if path not in norms} == {
        path: axes for path, axes in recorded.items() if path in found
    }
    assert {path for path in recorded if path not in found} == {
        f"{layer.path}.scale" for layer in backbone(CONFIG).layers if not layer.stack
    }


def test_layers_of_the_real_model():
    """method.md §3: 14 kinds in double and 6 in single blocks, 494 layers; §1: 3.25 B of 11.90 B are modulation."""
    record = backbone(FluxConfig())
    assert len(record.adapted) == 20 and sum(layer.depth for layer in record.adapted.values()) == 494
    sizes = {path: layer.weights + layer.depth * layer.outputs for path, layer in record.linears.items()}
    modulations = [path for path, layer in record.linears.items() if layer.modulation]
    assert sum(sizes[path] for path in (*modulations, "norm_out.linear")) == pytest.approx(3.25e9, rel=2e-3)
    norms = 128 * (19 * 4 + 38 * 2)
    assert sum(sizes.values()) + norms == 11_901_408_320


@pytest.mark.parametrize(
    "change, message",
    [({"role": "any"}, "role 'any'"), ({"role": ""}, "role ''"), ({"stream": "audio"}, "stream 'audio'")],
)
def test_a_layer_without_a_role_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(backbone(CONFIG).linears["x_embedder"], **change)
    with pytest.raises(TypeError, match="role"):
        nn_layers.Linear(2, 3, rngs=nnx.Rngs(0))  # pyrefly: ignore[missing-argument]
    with pytest.raises(KeyError):
        backbone(CONFIG).maker("transformer_blocks", rngs=nnx.Rngs(0))("attn.to_x")


# FLUX.2 klein's kind (docs/design.md): no biases, SwiGLU with gate and value in one input layer, one layer for q, k, v
# and MLP in single blocks, modulations shared by all blocks of a kind and so outside the stacks, four rope axes.
D, DOUBLE, SINGLE, CHANNELS, TEXT_WIDTH = 48, 2, 3, 16, 40
_BLOCK = {
    **{f"attn.{name}": (D, D, "image", "column") for name in ("to_q", "to_k", "to_v")},
    **{f"attn.add_{name}_proj": (D, D, "text", "column") for name in "qkv"},
    "attn.to_out_0": (D, D, "image", "row"),
    "attn.to_add_out": (D, D, "text", "row"),
    "ff.linear_in": (D, 6 * D, "image", "column"),
    "ff.linear_out": (3 * D, D, "image", "row"),
    "ff_context.linear_in": (D, 6 * D, "text", "column"),
    "ff_context.linear_out": (3 * D, D, "text", "row"),
}
_SINGLE_BLOCK = {
    "attn.to_qkv_mlp_proj": (D, 3 * D + 6 * D, "joint", "column"),
    "attn.to_out": (4 * D, D, "joint", "row"),
}
_OUTSIDE = {
    "x_embedder": (CHANNELS, D, "image", "embedder", False),
    "context_embedder": (TEXT_WIDTH, D, "text", "embedder", False),
    "time_embed.linear_1": (256, D, "vector", "embedder", False),
    "time_embed.linear_2": (D, D, "vector", "vector", False),
    "double_modulation_img.linear": (D, 6 * D, "vector", "modulation", True),
    "double_modulation_txt.linear": (D, 6 * D, "vector", "modulation", True),
    "single_modulation.linear": (D, 3 * D, "vector", "modulation", True),
    "norm_out.linear": (D, 2 * D, "vector", "vector", False),
    "proj_out": (D, CHANNELS, "image", "output", False),
}


def position_ids(height: int, width: int, image: int):
    y, x = np.indices((height, width)).reshape(2, -1)
    return np.stack([np.full_like(y, 10 * image), y, x, np.zeros_like(y)], -1)


def klein() -> Backbone:
    """The record of a backbone of klein's kind, of made-up sizes."""
    layers = [Linear(path, "", 1, *io, bias=False) for path, io in _OUTSIDE.items()]
    for stack, depth, block in (
        ("transformer_blocks", DOUBLE, _BLOCK),
        ("single_transformer_blocks", SINGLE, _SINGLE_BLOCK),
    ):
        layers += [Linear(f"{stack}.{path}", stack, depth, *io, True, bias=False) for path, io in block.items()]
    return Backbone(
        features=D,
        heads=6,
        stacks=(("transformer_blocks", DOUBLE), ("single_transformer_blocks", SINGLE)),
        layers=tuple(layers),
        other_rows=lambda layout: [],
        position_ids=position_ids,
        text_ids=lambda tokens: np.stack([*[np.zeros(tokens)] * 3, np.arange(tokens)], -1),
        text=lambda encoders, ids, dtype: (encoders[0](ids[0], dtype), None),
        latents=Latents(
            encode=lambda vae, images: vae(images),
            posterior=lambda vae, images: (vae(images), vae(images)),
            decode=lambda vae, latents: vae(latents),
            pack=lambda latents: latents.reshape(len(latents), -1, CHANNELS),
            unpack=lambda tokens, height, width: tokens.reshape(len(tokens), height, width, -1),
            patch=2,
        ),
        references=References(lambda a, a2, b, max_size=None: [a, a2, b], lambda image: image),
        schedule=type("KleinSchedule", (), {}),
    )


def test_flops_of_another_backbone():
    """By hand: rows · i · o of every layer, 2 · L² · d of every block's attention."""
    s, t, b = 20, 7, 3
    double = (4 * D * D + 6 * D * D + 3 * D * D) * (s + t) + 2 * (s + t) ** 2 * D
    single = (9 * D * D + 4 * D * D) * (s + t) + 2 * (s + t) ** 2 * D
    inputs = s * CHANNELS * D + t * TEXT_WIDTH * D
    vectors = 256 * D + D * D + 15 * D * D + 2 * D * D
    blocks, output = DOUBLE * double + SINGLE * single, s * D * CHANNELS
    record = klein()
    assert base_flops("forward", record, b, s, t) == 2 * b * (blocks + inputs + vectors + output)
    assert base_flops("velocity", record, b, s, t) == 2 * b * (blocks + inputs + output)
    # Low-rank: n·r·(i + o) a row.
    config = BasisConfig(size=5, rank=2, key_dim=8, query_dim=12)
    low_rank = 0
    for layer in record.adapted.values():
        rows = {"image": s, "text": t, "joint": s + t, "vector": 1}[layer.stream]
        low_rank += layer.depth * rows * 10 * (layer.inputs + layer.outputs)
    assert basis_flops("forward", record, config, b, s, t) == 2 * b * low_rank
    modulations = 10 * (3 * D + 15 * D)
    assert basis_flops("velocity", record, config, b, s, t) == 2 * b * (low_rank - modulations)


def test_a_basis_for_another_backbone():
    """A modulation outside the stacks has depth 1; every array of the basis is split as its layer's role says."""
    config = BasisConfig(size=4, rank=2, key_dim=8, query_dim=12)
    record = klein()
    basis = nnx.eval_shape(lambda: Basis(config, record.adapted, rngs=nnx.Rngs(0)))
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(basis))}
    assert flat["layers.double_modulation_img.linear.b"].shape == (1, 4, 2, 6 * D)
    assert flat["layers.single_transformer_blocks.attn.to_qkv_mlp_proj.b"].shape == (SINGLE, 4, 2, 9 * D)
    mesh = jax.sharding.AbstractMesh((1, 4, 1, 2), sharding.AXES)
    specs = {
        path: sharding.spec(mesh, sharding.variable_axes(leaf), leaf.shape)
        for path, leaf in flat.items()
        if "to_qkv_mlp_proj" in path or "attn.to_out." in path
    }
    P = jax.sharding.PartitionSpec
    stack = "layers.single_transformer_blocks.attn"
    # Column: outputs over tensor, members over fsdp; row: inputs over tensor.
    assert specs[f"{stack}.to_qkv_mlp_proj.b"] == P(None, "fsdp", None, "tensor")
    assert specs[f"{stack}.to_out.a"] == P(None, "fsdp", "tensor", None)
    for path, leaf in flat.items():
        split = sharding.spec(mesh, sharding.variable_axes(leaf), leaf.shape)
        assert "fsdp" in str(split), path


def test_weights_of_another_backbone_are_split_by_role():
    mesh, P = jax.sharding.AbstractMesh((1, 4, 1, 2), sharding.AXES), jax.sharding.PartitionSpec
    record = klein()
    axes = axes_of(record)
    assert set(axes) == {f"{path}.{name}" for path in record.linears for name in ("kernel", "scale")}
    split = {
        layer.path: sharding.spec(mesh, axes[f"{layer.path}.kernel"], shapes_of(layer)[0]) for layer in record.layers
    }
    assert split["single_transformer_blocks.attn.to_qkv_mlp_proj"] == P(None, "fsdp", "tensor")
    assert split["single_transformer_blocks.attn.to_out"] == P(None, "tensor", "fsdp")
    assert split["double_modulation_img.linear"] == P(None, ("fsdp", "tensor"))
    assert split["x_embedder"] == P("fsdp", "tensor")
    # A module that takes its layers from the record has the same.
    layer = record.maker("single_transformer_blocks", rngs=nnx.Rngs(0))("attn.to_out")
    assert sharding.variable_axes(layer.kernel) == axes["single_transformer_blocks.attn.to_out.kernel"]
    assert layer.kernel.shape == (4 * D, D) and layer.bias is None


def test_a_mix_is_folded_into_a_layer_outside_the_stacks():
    """Into one of depth 1, as a shared modulation is: W + Σ_n c_n A_n B_n by numpy in float64, to 1e-6."""
    record, path = klein(), "double_modulation_img.linear"
    module = nnx.Dict(layer=record.maker(rngs=nnx.Rngs(0))(path))
    basis = Basis(BasisConfig(size=4, rank=2, key_dim=8, query_dim=12), {path: record.adapted[path]}, rngs=nnx.Rngs(1))
    random = np.random.default_rng(0)
    basis.layers[path].b.set_value(jnp.asarray(random.normal(size=(1, 4, 2, 6 * D)), jnp.float32))
    c = random.normal(size=(1, 1, 4)).astype(np.float32)
    folded = fold(module, {"layer": basis.adapters({path: jnp.asarray(c)})[path]})
    a, b = (np.asarray(getattr(basis.layers[path], name)[0], np.float64) for name in "ab")
    update = np.einsum("n,nir,nro->io", c[0, 0].astype(np.float64), a, b)
    expected = np.asarray(module.layer.kernel[...], np.float64) + update
    assert folded.layer.kernel.shape == (D, 6 * D)
    np.testing.assert_allclose(folded.layer.kernel[...], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_planning_reads_another_backbone():
    record = klein()
    assert record.blocks == DOUBLE + SINGLE
    assert set(record.scanned) == {path for path in record.linears if path.split(".")[0].endswith("transformer_blocks")}
    assert record.modulations("transformer_blocks") == ()
    assert record.position_ids(2, 3, 1).shape == (6, 4) and record.text_ids(5).shape == (5, 4)
