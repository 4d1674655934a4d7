"""The transformer against diffusers' FluxTransformer2DModel (torch, float32) and the golden data."""

import itertools
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx
from golden import INPUTS, golden_dir

from lorweb_jax.adapters.mixture import LowRankAdapter
from lorweb_jax.common.errors import UserError
from lorweb_jax.files.state import build, flat_state, shapes
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import REMAT_POLICIES
from lorweb_jax.pipeline.pretrained import load_transformer

TOLERANCE = 1e-5


@jax.jit
def velocity(model, values):
    return model(*values)


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False, "num_layers": 1, "num_single_layers": 1}])
def test_equals_diffusers(changes, tmp_path):
    tiny = pytest.importorskip("tiny_flux")
    theirs, values = tiny.theirs(**changes), tiny.inputs()
    if not changes.get("guidance_embeds", True):
        values.pop("guidance")
    ours = tiny.ours(theirs, tmp_path)
    expected = tiny.run(theirs, values)
    assert relative(velocity(ours, [values.get(name) for name in INPUTS]), expected) <= TOLERANCE


def test_rounding_like_the_published_pipeline(tmp_path):
    """1000·timestep and 1000·guidance to bfloat16: 301.2 becomes 302, 150.3 becomes 150."""
    tiny = pytest.importorskip("tiny_flux")
    theirs, values = tiny.theirs(), tiny.inputs(batch=1)
    ours = tiny.ours(theirs, tmp_path)
    rounded = values | {"timestep": np.float32([0.302]), "guidance": np.float32([0.150])}
    given = values | {"timestep": np.float32([0.3012]), "guidance": np.float32([0.1503])}
    run = jax.jit(lambda model, values, switch: model(*values, round_to_bfloat16=switch), static_argnums=2)
    found = {switch: run(ours, [given[name] for name in INPUTS], switch) for switch in (True, False)}
    assert relative(found[True], tiny.run(theirs, rounded)) <= TOLERANCE
    assert relative(found[False], tiny.run(theirs, given)) <= TOLERANCE
    assert relative(found[True], found[False]) > 1e-3


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # proj_out's product joined, and in parts
def test_equals_golden(platform, monkeypatch):
    monkeypatch.setattr(sharding, "device_in_use", lambda: SimpleNamespace(platform=platform))
    config, parameters = load_transformer(golden_dir() / "tiny_pipeline" / "transformer")
    model = build(lambda: Flux(FluxConfig.from_json(config), rngs=nnx.Rngs(0)), parameters)
    with np.load(golden_dir() / "case_a.npz") as case:
        values = [case[name] for name in INPUTS]
        expected = {
            name: case[name]
            for name in ("base_output", "dbg/x_embedder", "dbg/context_embedder", "dbg/time_text_embed")
        }
    found = {
        "base_output": jax.jit(lambda model, values: model(*values))(model, values),
        "dbg/x_embedder": model.x_embedder(jnp.asarray(values[0])),
        "dbg/context_embedder": model.context_embedder(jnp.asarray(values[1])),
        "dbg/time_text_embed": model.time_text_embed(*(jnp.asarray(values[index]) for index in (3, 4, 2))),
    }
    for name, theirs in expected.items():
        error = np.linalg.norm(np.asarray(found[name]) - theirs) / np.linalg.norm(theirs)
        assert error <= TOLERANCE, name


@pytest.mark.usefixtures("quick_compiles")
def test_remat_policies_and_unrolling_give_the_same_gradients():
    config = FluxConfig(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        axes_dims_rope=(2, 2, 4),
    )
    random = np.random.default_rng(0)
    shape = [(1, 6, 8), (1, 3, 6), (1, 5), (1,), (1,), (6, 3), (3, 3)]
    values = [jnp.asarray(random.uniform(size=size), jnp.float32) for size in shape]
    # adaLN-Zero would make every block the identity: all weights are random.
    flat = {
        path: random.normal(0, 0.3, value.shape).astype(np.float32)
        for path, value in shapes(lambda: Flux(config, rngs=nnx.Rngs(0))).items()
    }

    adapters = {
        path: LowRankAdapter(
            *(
                random.normal(0, 0.3, (layer.depth, *size)).astype(np.float32)
                for size in ((2, layer.inputs, 3), (2, 3, layer.outputs), (1, 2))
            )
        )
        for path, layer in backbone(config).adapted.items()
    }

    def gradients(unstacked=False, **options):
        """{path: gradient} of the weights, blocks side by side again, and of the adapters."""
        flux = build(lambda: Flux(config, rngs=nnx.Rngs(0), **options), flat)
        if unstacked:
            flux.unstack()
        graphdef, state = nnx.split(flux)
        loss = jax.jit(
            jax.grad(lambda parts: jnp.square(nnx.merge(graphdef, parts[0])(*values, adapters=parts[1])).sum())
        )
        state, of_adapters = loss((state, adapters))
        found = flat_state(nnx.merge(graphdef, state))
        if unstacked:
            blocks = {path: re.sub(r"\.blocks\.\d+", "", path) for path in found}
            found = {
                path: np.stack([found[each] for each in blocks if blocks[each] == path])
                if path not in found
                else found[path]
                for path in set(blocks.values())
            }
        return found | {
            f"{path} {name}": getattr(adapter, name)
            for path, adapter in of_adapters.items()
            for name in ("a_nir", "b_nro", "coeff_bn")
        }

    expected = gradients()
    for options in ({"remat": "full", "unroll": 2}, {"remat": "qkv"}, {"remat": "dots", "unstacked": True}):
        gradient = gradients(**options)
        assert gradient.keys() == expected.keys()
        for path, found in gradient.items():
            size = np.linalg.norm(expected[path])
            assert np.linalg.norm(found - expected[path]) <= TOLERANCE * max(size, 1e-3), (options, path)


def test_what_a_backward_pass_computes_again():
    """Products of a double and a single block with adapters, counted in the traced gradient."""
    config = FluxConfig(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=128)
    sizes = ((1, 6, 64), (1, 3, 4096), (1, 768), (1,), (1,), (6, 3), (3, 3))
    inputs = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    adapters = {
        path: LowRankAdapter(
            *(
                jax.ShapeDtypeStruct(size, jnp.float32)
                for size in ((1, 2, layer.inputs, 3), (1, 2, 3, layer.outputs), (1, 1, 2))
            )
        )
        for path, layer in backbone(config).adapted.items()
    }

    def products(remat):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Flux(config, remat=remat, rngs=nnx.Rngs(0))))

        def loss(adapters, state, inputs):
            return jnp.square(nnx.merge(graphdef, state)(*inputs, adapters=adapters)).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(adapters, state, inputs)).count("dot_general[")

    counts = {remat: products(remat) for remat in REMAT_POLICIES}
    again = {remat: count - counts["none"] for remat, count in counts.items()}
    attention = 2 * 2  # XLA's, which keeps no log-sum-exp
    hidden = 3 * 2  # net_0_proj of both streams and proj_mlp: the layer's product and the second of its adapter
    qkv = (6 + 3) * 2
    inner = 3 + 2 + 5  # the adapters' first: one for q, k and v (and the MLP), two net_0_proj, five ends of branches
    ends = 5 * 2
    expected = {"dots": attention, "qkv": hidden, "outputs": qkv, "attention": inner + ends, "full": 0}
    found = {remat: again[remat] - again[less] for less, remat in itertools.pairwise(REMAT_POLICIES)}
    assert found == expected


def test_unstacked_blocks_compute_the_same(tmp_path):
    """Against diffusers; no weight is there twice."""
    tiny = pytest.importorskip("tiny_flux")
    theirs, values = tiny.theirs(), tiny.inputs()
    ours = tiny.ours(theirs, tmp_path)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(ours)))
    ours.unstack()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(ours))) == size
    kernel = ours.single_transformer_blocks.blocks[1].proj_out.kernel[...]
    expected = theirs.single_transformer_blocks[1].proj_out.weight.detach().numpy().T
    np.testing.assert_array_equal(kernel, expected)
    assert relative(velocity(ours, [values[name] for name in INPUTS]), tiny.run(theirs, values)) <= TOLERANCE


def test_real_model_has_the_published_number_of_parameters():
    sizes = shapes(lambda: Flux(FluxConfig(), rngs=nnx.Rngs(0)))
    assert sum(math.prod(value.shape) for value in sizes.values()) == 11_901_408_320
    modulations = [value for path, value in sizes.items() if ".norm" in path and ".linear." in path]
    assert round(sum(math.prod(value.shape) for value in modulations) / 1e9, 2) == 3.23


def test_config_words():
    config = FluxConfig(num_layers=3, axes_dims_rope=(16, 56, 56))
    assert FluxConfig.from_json(config.to_json() | {"unknown_to_us": 1}) == config
    for change, message in [
        ({"patch_size": 2}, "patch_size is 2, expected 1"),
        ({"out_channels": 32}, "out_channels is 32"),
        ({"axes_dims_rope": [16, 56, 40]}, "attention_head_dim = 128"),
        ({"axes_dims_rope": [17, 55, 56]}, "must be even"),
    ]:
        with pytest.raises(UserError, match=message):
            FluxConfig.from_json(config.to_json() | change)
