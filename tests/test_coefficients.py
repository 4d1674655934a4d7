"""Fixed coefficients by name, one row for each example of a batch; parameters of a basis that are not trained."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from compare import relative
from flax import nnx

from lorweb_jax import Basis, BasisConfig, UserError
from lorweb_jax.adapters.basis import BasisParam, FrozenBasisParam, LayerShape
from lorweb_jax.common.schema import checked
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.nn.layers import Weight
from lorweb_jax.runs.checkpoints import restore_trainables
from lorweb_jax.settings.config import base_config
from lorweb_jax.settings.seeds import random_key
from lorweb_jax.training.job import Batches, Job
from lorweb_jax.training.loop import train

SHAPES = {"double.layer": LayerShape(2, 5, 7), "single.layer": LayerShape(3, 4, 4)}
TABLE = {"both": (1, 1), "content": (1, 0), "style": (0, 1), "none": (0, 0)}
PAIR = BasisConfig(size=2, rank=3, query="fixed", query_dim=None, table=TABLE, frozen=("a",))


def trained(config: BasisConfig) -> Basis:
    basis = Basis(config, SHAPES, rngs=nnx.Rngs(0))
    for layer in basis.layers.values():
        layer.b.set_value(jax.random.normal(jax.random.key(1), layer.b.shape))
    return basis


def test_a_row_of_the_table_for_each_example():
    """Σ c_n x A_n B_n of each example by its own row, in float64; a batch may mix all rows."""
    basis, random = trained(PAIR), np.random.default_rng(0)
    names = ["style", "both", "none", "content", "style"]
    adapters = basis.adapters(basis.named(names))
    for path, (depth, inputs, *_) in SHAPES.items():
        x = random.normal(size=(depth, 5, 6, inputs)).astype(np.float32)
        found = jax.vmap(lambda adapter, x: adapter(x))(adapters[path], jnp.asarray(x))
        a, b = (np.asarray(p[...], np.float64) for p in (basis.layers[path].a, basis.layers[path].b))
        rows = np.array([TABLE[name] for name in names], np.float64)
        assert relative(found, np.einsum("lbsi,lnir,bn,lnro->lbso", x, a, rows, b)) <= 1e-6
        assert not np.asarray(found[:, 2]).any()


def test_the_first_row_is_the_default_and_rows_are_mixes():
    basis = trained(PAIR)
    for path, c in basis.coefficients(batch=3).items():
        np.testing.assert_array_equal(c, np.ones((SHAPES[path][0], 3, 2)))
    content, style, both = (basis.mix(name) for name in ("content", "style", "both"))
    for path in SHAPES:
        np.testing.assert_array_equal((content + style).coefficients[path], both.coefficients[path])
        np.testing.assert_array_equal(style.coefficients[path], basis.mix(1).coefficients[path])
    plain = trained(BasisConfig(size=2, rank=3, query="fixed", query_dim=None))
    for path, (depth, *_) in SHAPES.items():
        np.testing.assert_array_equal(plain.mix("all").coefficients[path], np.ones((depth, 2)))
    with pytest.raises(UserError, match="no mix 'styel' in this basis; it has both, content, style, none"):
        basis.mix("styel")
    with pytest.raises(UserError, match="named mixes"):
        trained(BasisConfig(size=2, rank=3, key_dim=4, query_dim=6)).named(["style"])


def test_only_what_is_not_frozen_is_trained():
    """By the training job's filter: A frozen, B frozen, and the router beside both."""
    for frozen, query in ((("a",), "fixed"), (("b",), "fixed"), (("a", "b"), "internal")):
        config = dataclasses.replace(PAIR, frozen=frozen, table=(), query=query, query_mode="caa'", key_dim=4)
        basis = trained(config)
        _, train, kept, rest = nnx.split(basis, BasisJob.trainable, FrozenBasisParam, ...)
        names = {path[-1] for path, _ in nnx.to_flat_state(train)}
        router = {"keys", "projection"} if query == "internal" else set()
        assert names == {"a", "b"} - set(frozen) | router
        assert {path[-1] for path, _ in nnx.to_flat_state(kept)} == set(frozen) and not jax.tree.leaves(rest)
        assert {*basis.to_arrays()["single.layer"]} == {"a", "b"} | router


def test_what_is_frozen_stays_in_float32():
    arrays = {
        path: {name: np.asarray(x).astype(np.float16) for name, x in parts.items()}
        for path, parts in trained(PAIR).to_arrays().items()
    }
    basis = Basis.from_arrays(PAIR, arrays)
    assert {(type(p), p.dtype.name) for layer in basis.layers.values() for p in (layer.a, layer.b)} == {
        (FrozenBasisParam, "float32"),
        (BasisParam, "float16"),
    }


def test_configs_of_tables():
    """Hashable, the same again from JSON, and refused in a sentence."""
    assert hash(PAIR) == hash(dataclasses.replace(PAIR))
    assert checked(dataclasses.asdict(PAIR), BasisConfig, "config.json") == PAIR
    for change, message in (
        ({"table": {"x": (1,)}}, "rows of 2 finite numbers"),
        ({"table": {"x": (1, math.nan)}}, "rows of 2 finite numbers"),
        ({"table": {"": (1, 1)}}, "by name"),
        ({"table": {3: (1, 1)}}, "by name"),
        ({"table": 5}, "basis.table is 5"),
        ({"table": {"x": "ab"}}, "basis.table"),
        ({"query": "external"}, 'basis.query is "external"'),
        ({"frozen": "keys"}, "basis.frozen is 'keys'"),
        ({"frozen": None}, "basis.frozen is None"),
        ({"frozen": (["a"],)}, "basis.frozen"),
    ):
        with pytest.raises(UserError, match=message) as error:
            dataclasses.replace(PAIR, **change)
        assert error.value.code == 2 and "\n" not in str(error.value)


class Points(Batches):
    def __next__(self):
        x = np.random.default_rng(0).normal(size=(4, 3, 4)).astype(np.float32)
        return {"x": x, "y": x[..., ::-1].copy()}

    def get_state(self):
        return {}

    def set_state(self, state):
        pass


class FrozenJob(Job):
    """A linear layer's adapter, its A frozen, learns to reverse its input; a weight of the base beside it."""

    trainable = BasisParam

    def build(self, rngs):
        return nnx.Dict(basis=Basis(PAIR, {"layer": LayerShape(1, 4, 4)}, rngs=rngs), weight=Weight(jnp.ones((4,))))

    def data(self, config):
        return Points()

    def loss(self, model, batch, key):
        adapter = jax.tree.map(lambda x: x[0], model["basis"].adapters(model["basis"].coefficients(batch=4))["layer"])
        return jnp.square(adapter(batch["x"]) * model["weight"][...] - batch["y"]).mean(), {}

    def finish(self, model, workdir):
        np.save(workdir / "a.npy", model["basis"].layers["layer"].a[...])


def test_a_run_keeps_what_is_frozen(tmp_path, monkeypatch):
    """In checkpoints, to the bit and in float32 over bfloat16 weights; never in the optimizer. A run that goes on takes
    it from there, whatever its seed would make now."""
    config = base_config("test_coefficients:FrozenJob")
    config.seed, config.train.batch, config.train.param_dtype, config.compile_cache = 3, 4, "bfloat16", False
    config.train.steps = config.train.checkpoint_every = config.train.log_images_every = 2
    train(config, tmp_path, lambda config: FrozenJob())
    weights, _ = restore_trainables(tmp_path)
    assert weights.keys() == {"basis.layers.layer.a", "basis.layers.layer.b"} and weights["basis.layers.layer.b"].any()
    a, build = weights["basis.layers.layer.a"], FrozenJob.build
    np.testing.assert_array_equal(a, build(None, nnx.Rngs(random_key(3)))["basis"].layers["layer"].a[...])
    np.testing.assert_array_equal(a, np.load(tmp_path / "a.npy"))
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.metadata((tmp_path / "checkpoints/2/state").absolute()).item_metadata.tree
    assert a.dtype == np.float32 and state["constants"].keys() == {"basis.layers.layer.a"}
    optimizer = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(state["optimizer"])]
    assert any("layer.b" in name for name in optimizer) and not any("layer.a" in name for name in optimizer)

    config.train.steps = 4
    monkeypatch.setattr(FrozenJob, "build", lambda self, rngs: build(self, nnx.Rngs(99)))
    train(config, tmp_path, lambda config: FrozenJob())
    longer, _ = restore_trainables(tmp_path)
    np.testing.assert_array_equal(longer["basis.layers.layer.a"], a)
    assert not np.array_equal(longer["basis.layers.layer.b"], weights["basis.layers.layer.b"])
