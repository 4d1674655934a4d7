"""A basis on the transformer: fresh, low-rank, folded, mixed in one batch, and as an ordinary LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative
from flax import nnx
from golden import INPUTS

from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.fold import fold
from lorweb_jax.adapters.formats.layer_names import layer_name
from lorweb_jax.models.flux1.record import backbone

tiny = pytest.importorskip("tiny_flux")  # torch and diffusers

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("quick_compiles")
CONFIG = BasisConfig(size=4, rank=3, key_dim=8, heads=2, query_dim=10)


@pytest.fixture(scope="module")
def theirs():
    return tiny.theirs()


@pytest.fixture(scope="module")
def model(theirs, tmp_path_factory):
    return tiny.ours(theirs, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def values():
    return [tiny.inputs()[name] for name in INPUTS]


@jax.jit
def velocity(model, values, adapters=None):
    return model(*values, adapters=adapters)


def trained(model, config):
    """A basis whose B is no longer zero."""
    basis = Basis(config, backbone(model.config).adapted, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    for layer in basis.layers.values():
        layer.b.set_value(jnp.asarray(random.normal(size=layer.b.shape), jnp.float32))
    return basis


def first(values):
    return [value[:1] for value in values[:5]] + list(values[5:])


def test_a_fresh_basis_changes_nothing_bit_for_bit(model, values):
    plain = np.asarray(velocity(model, values))
    query = jax.random.normal(jax.random.key(0), (2, 10))
    internal = BasisConfig(
        size=4, rank=3, key_dim=8, query="internal", query_mode="caa'", pooling="max", query_dim=None
    )
    for config in (CONFIG, internal):
        basis = Basis(config, backbone(model.config).adapted, rngs=nnx.Rngs(0))
        assert velocity(model, values, basis.adapters(basis.coefficients(query))).tobytes() == plain.tobytes()


def test_folded_equals_low_rank(model, values):
    basis = trained(model, CONFIG)
    mix = basis.adapters(basis.coefficients(jax.random.normal(jax.random.key(0), (1, 10))))
    low_rank = velocity(model, first(values), mix)
    folded = fold(model, mix)
    assert relative(velocity(folded, first(values)), low_rank) <= TOLERANCE
    plain = velocity(model, first(values))
    assert relative(plain, low_rank) > 0.1  # the basis does something, and the model is not changed
    assert relative(velocity(fold(model, {}), first(values)), plain) == 0


def test_folded_into_unstacked_blocks(theirs, model, values, tmp_path):
    basis = trained(model, CONFIG)
    mix = basis.adapters(basis.coefficients(jax.random.normal(jax.random.key(0), (1, 10))))
    low_rank = velocity(model, first(values), mix)
    unstacked = tiny.ours(theirs, tmp_path)
    unstacked.unstack()
    assert relative(velocity(unstacked, first(values), mix), low_rank) <= TOLERANCE
    assert relative(velocity(fold(unstacked, mix), first(values)), low_rank) <= TOLERANCE
    assert relative(velocity(unstacked, first(values)), velocity(model, first(values))) <= TOLERANCE


def test_different_analogies_in_a_batch(model, values):
    basis = trained(model, CONFIG)
    query = jax.random.normal(jax.random.key(0), (2, 10))
    together = velocity(model, values, basis.adapters(basis.coefficients(query)))
    for index in range(2):
        one = [value[index : index + 1] for value in values[:5]] + list(values[5:])
        mix = basis.adapters(basis.coefficients(query[index : index + 1]))
        assert relative(together[index : index + 1], velocity(fold(model, mix), one)) <= TOLERANCE
    swapped = velocity(model, values, basis.adapters(basis.coefficients(query[::-1])))
    assert relative(together, swapped) > 1e-3


def test_one_member_is_an_ordinary_lora_in_peft(model, values, tmp_path):
    """N = 1 with its coefficient fixed at 1, against diffusers' model with PEFT's LoRA on the same 46 layers."""
    peft = pytest.importorskip("peft")
    import torch

    basis = trained(model, BasisConfig(size=1, rank=3, query="fixed", query_dim=None, scale=0.5))
    names = {
        layer_name(path, block): (path, block)
        for path, shape in backbone(model.config).adapted.items()
        for block in range(shape.depth)
    }
    theirs = tiny.theirs()
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=list(names), lora_dropout=0.0))
    adapted = dict(theirs.named_modules())
    for name, (path, block) in names.items():
        layer, ours = adapted[name], basis.layers[path]
        layer.lora_A["default"].weight.data = torch.tensor(np.asarray(ours.a[...][block, 0].T))
        layer.lora_B["default"].weight.data = torch.tensor(np.asarray(ours.b[...][block, 0].T))
    expected = tiny.run(theirs, dict(zip(INPUTS, values)))
    low_rank = velocity(model, values, basis.adapters(basis.coefficients(batch=2)))
    assert relative(low_rank, expected) <= TOLERANCE
    folded = fold(model, basis.adapters(basis.coefficients(batch=1)))
    assert relative(velocity(folded, values), expected) <= TOLERANCE
    assert relative(velocity(model, values), expected) > 0.05
