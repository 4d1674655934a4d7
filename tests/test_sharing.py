"""What may spread the work over a basis's members, each against its formula in float64; off, nothing changes."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special, stats

from configs import basis as basis_config
from lorweb_jax.adapters.basis import Basis, BasisConfig, BasisParam, LayerShape
from lorweb_jax.adapters.formats.basis_file import read_basis, write_basis
from lorweb_jax.adapters.router import Router
from lorweb_jax.adapters.sharing import drop_members, imbalance
from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.training.job import Phase
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import TrainState
from lorweb_jax.training.step import make_update

pytestmark = pytest.mark.usefixtures("quick_compiles")
SHAPES = {"single_transformer_blocks.attn.to_q": LayerShape(2, 6, 7)}


def arrays(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for shape in shapes]


def basis_of(**options):
    return Basis(BasisConfig(size=5, rank=2, key_dim=8, query_dim=11, **options), SHAPES, rngs=nnx.Rngs(3))


def scores(query, keys, projection, heads, normalised):
    """[b, heads, n] in float64."""
    projected = query.astype(np.float64) @ projection.astype(np.float64).T
    query, keys = (np.split(x.astype(np.float64), heads, axis=-1) for x in (projected, keys))
    width, rows = len(keys[0][0]), []
    for q, k in zip(query, keys):
        if normalised:  # √(k/h) times the cosine
            lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(k, axis=1)
            rows.append(math.sqrt(width) * (q @ k.T) / lengths)
        else:
            rows.append(q @ k.T / math.sqrt(width))
    return np.stack(rows, 1)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("heads, activation", [(1, "softmax"), (4, "softmax"), (2, "tanh")])
def test_temperatures_and_normalised_queries(heads, activation, normalised):
    """A fixed temperature, a layer's learnt one and an example's annealed one divide scores, all at once."""
    query, keys, projection = arrays((3, 11), (5, 8), (8, 11))
    log_temperature, annealed = np.float32(-0.4), np.array([0.5, 1.0, 3.0], np.float32)
    found = Router(heads, activation, "mean", normalised, 0.7)(query, keys, projection, log_temperature, annealed)
    divided = scores(query, keys, projection, heads, normalised) / 0.7 / math.exp(-0.4) / annealed[:, None, None]
    expected = special.softmax(divided, axis=-1) if activation == "softmax" else np.tanh(divided)
    np.testing.assert_allclose(found, expected.mean(1), rtol=2e-6, atol=1e-6)


def test_a_basis_has_the_temperature_that_its_config_says():
    """Fixed: a constant; learnt: a number a layer that begins there and has a gradient; annealed: 1 afterwards."""
    [query] = arrays((2, 11))
    plain = basis_of().coefficients(query)
    [path] = SHAPES
    fixed, learnt, annealed = (
        basis_of(temperature=2.0, temperature_mode=mode) for mode in ("fixed", "learnt", "annealed")
    )
    parts = {name: np.asarray(array) for name, array in basis_of().to_arrays()[path].items()}
    expected = [
        special.softmax(scores(query, keys, projection, 1, False)[:, 0] / 2, axis=-1)
        for keys, projection in zip(parts["keys"], parts["projection"])
    ]
    for basis, temperature in ((fixed, None), (learnt, None), (annealed, np.full(2, 2, np.float32))):
        found = basis.coefficients(query, temperature_b=temperature)[path]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(annealed.coefficients(query)[path], plain[path])
    assert learnt.layers[path].log_temperature[...].tolist() == [pytest.approx(math.log(2))] * 2
    gradient = nnx.grad(lambda basis: (basis.coefficients(query)[path] ** 2).sum())(learnt)
    assert np.abs(gradient["layers"][path]["log_temperature"][...]).min() > 0
    scaled = basis_of(key_scale=0.25).layers[path].keys[...]
    np.testing.assert_array_equal(scaled, 0.25 * parts["keys"])


@pytest.mark.parametrize("mode, temperature", [("fixed", 0.25), ("learnt", 3.0), ("annealed", 4.0)])
def test_the_published_format_holds_a_temperature_in_its_keys(mode, temperature, tmp_path):
    basis, [query] = basis_of(temperature=temperature, temperature_mode=mode), arrays((2, 11))
    write_basis(tmp_path / "basis.safetensors", basis.config, basis.to_arrays())
    write_basis(tmp_path / "basis.safetensors", basis.config, basis.to_arrays())  # the same config.yaml again
    config, parts = read_basis(tmp_path / "basis.safetensors")
    assert (config.temperature, config.temperature_mode, config.key_scale) == (1.0, "fixed", 1.0)
    again = Basis.from_arrays(config, parts)
    for path, c in basis.coefficients(query).items():
        np.testing.assert_allclose(again.coefficients(query)[path], c, rtol=2e-6, atol=1e-6)


def test_what_the_published_format_cannot_hold(tmp_path):
    basis = basis_of(normalised=True)
    with pytest.raises(UserError, match="normalises query and keys .* cannot hold"):
        write_basis(tmp_path / "basis.safetensors", basis.config, basis.to_arrays())
    assert not list(tmp_path.iterdir())


def test_imbalance_is_the_entropy_that_the_batchs_mean_lacks():
    """Against scipy, with negative coefficients too; 0 where examples take members in turns, log n for one alone."""
    c = {"one": arrays((3, 4, 5))[0], "two": arrays((2, 4, 5), seed=1)[0]}
    expected = []
    for of in c.values():
        share = np.abs(of.astype(np.float64)) / np.abs(of.astype(np.float64)).sum(-1, keepdims=True)
        expected += [math.log(5) - stats.entropy(layer.mean(0)) for layer in share]
    assert float(imbalance(c)) == pytest.approx(np.mean(expected), rel=1e-5)
    assert float(imbalance({"x": jnp.eye(4)[None]})) == pytest.approx(0, abs=1e-6)
    assert float(imbalance({"x": jnp.eye(4)[None, [2, 2]]})) == pytest.approx(math.log(4), rel=1e-6)


def test_dropped_members():
    """Softmax: as over the members that are left; where none is, all stay. Else the expectation stays."""
    logits = arrays((2, 300, 5))[0].astype(np.float64)
    c = {"x": special.softmax(logits, -1).astype(np.float32)}
    found = np.asarray(drop_members(c, jax.random.key(0), 0.5, True)["x"])
    left = found > 0
    expected = special.softmax(np.where(left, logits, -np.inf), -1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert 0.4 < (~left).mean() < 0.55 and left.all(-1).any() and left.any(-1).all()
    ones = {"x": np.ones((40, 50, 5), np.float32), "y": np.ones((40, 50, 5), np.float32)}
    dropped = {path: np.asarray(of) for path, of in drop_members(ones, jax.random.key(1), 0.25, False).items()}
    assert set(np.unique(dropped["x"])) == {0, np.float32(1 / 0.75)}
    assert dropped["x"].mean() == pytest.approx(1, abs=0.02) and (dropped["x"] != dropped["y"]).any()


def test_annealing_goes_from_the_temperature_to_one():
    """Geometrically, by the number of the batch that was read last, so that a resumed run goes on where it was."""
    config = basis_config.smoke()
    config.basis.temperature, config.basis.temperature_mode, config.train.steps = 16.0, "annealed", 4
    job = BasisJob.__new__(BasisJob)
    job.config, job.basis_config = config, BasisConfig(**config.basis)

    class Loader:
        def get_state(self):
            return {"batches": self.batches}

    job._loader = Loader()
    found = []
    for job._loader.batches in range(1, 6):
        found.append(job._temperature())
    np.testing.assert_allclose(found, [16, 8, 4, 2, 1])


def test_a_training_step_balances_drops_and_anneals():
    """Of one batch and key: the term comes on top, weighted; layers get what is left of the annealed coefficients."""
    basis, [query] = basis_of(), arrays((2, 11))
    job = BasisJob.__new__(BasisJob)
    job.config, job.basis_config = basis_config.smoke(), basis.config
    job.folder = SimpleNamespace(vae_config=SimpleNamespace(downscale=8))
    seen = []

    def velocity(tokens, *arguments):
        seen.append({path: adapter.coeff_bn for path, adapter in arguments[-1].items()})
        return 0 * tokens

    latents = SimpleNamespace(pack=lambda x: x.reshape(2, -1, 3))
    model = SimpleNamespace(basis=basis, velocity=velocity, backbone=SimpleNamespace(latents=latents))
    batch = {"latents": np.ones((2, 2, 4, 4, 3), np.float32), "text": None, "pooled": None, "query": query}

    def loss(**changes):
        temperature = {"temperature": changes.pop("temperature")} if "temperature" in changes else {}
        with job.config.unlocked():
            job.config.routing.update(changes)
        value, metrics = job.loss(model, batch | temperature, jax.random.key(0))
        return float(value), metrics

    plain, metrics = loss()
    assert not metrics
    balanced, metrics = loss(balance=0.5)
    expected = imbalance(basis.coefficients(query))
    assert float(metrics["imbalance"]) == float(expected)
    assert balanced - plain == pytest.approx(0.5 * float(expected), rel=1e-4)
    loss(balance=0.0, temperature=np.full(2, 4, np.float32))
    loss(member_dropout=0.5)
    [path] = SHAPES
    whole, _, annealed, dropped = (np.asarray(of[path]) for of in seen)
    np.testing.assert_array_equal(annealed, basis.coefficients(query, temperature_b=np.full(2, 4, np.float32))[path])
    kept = dropped > 0
    assert 0 < kept.mean() < 1
    np.testing.assert_allclose(
        dropped, np.where(kept, whole, 0) / np.where(kept, whole, 0).sum(-1, keepdims=True), rtol=1e-5
    )


def test_the_router_has_a_learning_rate_of_its_own():
    """Of one step by AdamW with weight decay from the same weights and gradient: its change is the plain one times the
    rate, to float32, members change alike, and at 0 it stays to the bit."""
    config = basis_config.smoke()
    with config.unlocked():
        config.optimizer.update({"learning_rate": 0.1, "schedule": "constant", "warmup": 0, "weight_decay": 0.1})
    job = BasisJob.__new__(BasisJob)
    job.config = config
    basis = basis_of(temperature_mode="learnt", temperature=2.0)
    weights = {name: array[...] for name, array in nnx.to_flat_state(nnx.state(basis, BasisParam))}
    weights = {".".join(map(str, name)): array for name, array in weights.items()}
    job.loss = lambda model, batch, key: (sum((array**2).sum() for array in model.values()), {})
    job.phases = lambda: [Phase("train", job.loss)]
    partition = SimpleNamespace(paths=lambda phase: list(weights), model=lambda trainable, frozen: trainable)
    optimizer = make_optimizer(config)
    state = TrainState(jnp.zeros((), jnp.int32), weights, None, {"train": optimizer.init(weights)}, {})

    def change(rate):
        with config.unlocked():
            config.routing.rate = rate
        after, _ = make_update(job, partition, optimizer, config)(state, {}, {})
        return {name: np.asarray(after.trainable[name]) - np.asarray(array) for name, array in weights.items()}

    plain, slow, still = change(1.0), change(0.25), change(0.0)
    parts = {name.rpartition(".")[2] for name in weights}
    assert parts == {"a", "b", "keys", "projection", "log_temperature"}
    for name, moved in plain.items():
        router = name.endswith(("keys", "projection", "log_temperature"))
        assert np.abs(moved).max() > 0 or name.endswith(".b")  # zeros have no gradient here
        np.testing.assert_allclose(slow[name], moved * (0.25 if router else 1), rtol=1e-4, atol=2e-7)
        assert not router or not still[name].any()
