"""Adam with small moments against float64 Adam, and what its state weighs."""

import functools

import jax
import jax.numpy as jnp
import line_job
import numpy as np
import optax
import pytest

from lorweb_jax.jobs import make_job
from lorweb_jax.nn import sharding
from lorweb_jax.settings.config import base_config
from lorweb_jax.training.loop import train
from lorweb_jax.training.moments import scale_by_adam
from lorweb_jax.training.optimizer import make_optimizer

B1, B2 = 0.9, 0.99
# Largest relative error (L2) of a step's direction after 100 steps whose gradients span two decades in a block.
TOLERANCE = {"bfloat16": 0.01, "int8": 0.07}


@functools.partial(jax.jit, static_argnums=(0, 2))
def directions(kind, gradients, seed=0):
    """Adam's direction of each step, [t, ...], and the last state."""
    adam = scale_by_adam(B1, B2, kind, seed)

    def step(state, gradient):
        updates, state = adam.update({"x.a": gradient}, state)
        return state, updates["x.a"]

    state, found = jax.lax.scan(step, adam.init({"x.a": gradients[0]}), gradients)
    return found, state


def exact(gradients):
    m = v = np.zeros(gradients[0].shape)
    for t, gradient in enumerate(gradients.astype(np.float64), 1):
        m, v = B1 * m + (1 - B1) * gradient, B2 * v + (1 - B2) * gradient**2
        yield m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-8)


@pytest.fixture(scope="module")
def gradients():
    """100 steps for a [2, 384, 4]: each number has a size of its own, some are never anything but zero."""
    random = np.random.default_rng(0)
    size = 10 ** random.uniform(-3, -1, (2, 384, 4))
    size[:, :, 3] = 0
    return (size * random.normal(0.3, 1, (100, *size.shape))).astype(np.float32)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_steps_are_adams(kind, gradients):
    found, state = jax.tree.map(np.asarray, directions(kind, gradients))
    expected = np.stack(list(exact(gradients)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)  # nothing has been rounded yet
    errors = np.sqrt(np.square(found - expected).sum((1, 2, 3)) / np.square(expected).sum((1, 2, 3)))
    assert errors.max() < TOLERANCE[kind]
    assert abs(np.sum(found * expected) / np.sum(expected**2) - 1) < 0.005  # and not shorter or longer
    assert np.abs(found).max() < 1.2 * np.abs(expected).max() and not found[..., 3].any()
    assert np.asarray(directions(kind, gradients, 1)[0])[1:].tobytes() != found[1:].tobytes()
    assert {name: (held["x.a"].dtype.name, held["x.a"].shape) for name, held in state.moments.items()} == {
        "bfloat16": {"m": ("bfloat16", (2, 384, 4)), "v": ("bfloat16", (2, 384, 4))},
        "int8": {
            "m": ("int8", (2, 384, 4)),
            "v": ("uint8", (2, 384, 4)),
            "m_scale": ("float32", (2, 4, 4)),
            "v_scale": ("float32", (2, 4, 4)),
        },
    }[kind]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_forgotten_gradient_fades(kind):
    """v falls by 1 % a step, less than a code: rounded to nearest it would never get down."""
    gradients = np.zeros((400, 1, 512), np.float32)
    gradients[0] = 10 ** np.random.default_rng(0).uniform(-4, -1, 512)
    held = {
        name: np.asarray(arrays["x.a"], np.float64) for name, arrays in directions(kind, gradients)[1].moments.items()
    }
    v = held["v"] if kind == "bfloat16" else np.repeat(held["v_scale"], 128, -1) * (held["v"] / 255) ** 4
    faded = v.sum() / ((1 - B2) * B2**399 * np.square(gradients[0].astype(np.float64)).sum())
    assert 0.8 < faded < 1.25


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_noisy_quadratic_is_descended_alike(kind):
    """200 steps of config's AdamW on ½ Σ s·(x − 1)²: the losses that float64 AdamW reaches, within 2 % in 8 bit."""
    config = base_config("line_job:make")
    config.optimizer.learning_rate, config.optimizer.moments, config.train.steps = 0.02, kind, 200
    optimizer, random = make_optimizer(config), np.random.default_rng(0)
    size = 10 ** random.uniform(-2, 0, 1024).astype(np.float32)
    noise = random.normal(0, 0.1, (200, 1024)).astype(np.float32)

    def step(carry, noise):
        updates, state = optimizer.update({"x": size * (carry[0]["x"] - 1 + noise)}, carry[1], carry[0])
        x = optax.apply_updates(carry[0], updates)
        return (x, state), x["x"]

    start = {"x": jnp.zeros(1024)}
    path = np.asarray(jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), noise)[1])())
    mine, m, v, curves = np.zeros(1024), 0.0, 0.0, []
    for t in range(1, 201):
        gradient = size * (mine - 1 + noise[t - 1])
        gradient *= min(1, 1 / np.linalg.norm(gradient))
        m, v = B1 * m + (1 - B1) * gradient, B2 * v + (1 - B2) * gradient**2
        mine = mine - 0.02 * (m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-8) + 0.05 * mine)
        curves.append([0.5 * np.sum(size * (x - 1) ** 2) for x in (path[t - 1], mine)])
    curves = np.array(curves)
    assert curves[-1, 1] < 0.05 * curves[0, 1]
    relative = np.abs(curves[:, 0] / curves[:, 1] - 1)
    assert relative[-50:].max() < {"float32": 1e-4, "bfloat16": 5e-3, "int8": 0.02}[kind]


def test_states_are_split_like_their_parameters_and_weigh_what_is_said():
    """Of the published basis: 835,051,520 parameters, counted here without the transformer's code."""
    config = base_config("line_job:make")
    depths = {
        (19, 3072, 18432): 2,
        (19, 3072, 3072): 8,
        (19, 3072, 12288): 2,
        (19, 12288, 3072): 2,
        (38, 3072, 9216): 1,
        (38, 3072, 3072): 3,
        (38, 3072, 12288): 1,
        (38, 15360, 3072): 1,
    }
    parameters = {}
    for (l, i, o), count in depths.items():
        for index in range(count):
            path = f"basis.layers.x{i}_{o}_{l}_{index}"
            parameters |= {
                f"{path}.a": (l, 32, i, 4),
                f"{path}.b": (l, 32, 4, o),
                f"{path}.keys": (l, 32, 128),
                f"{path}.projection": (l, 128, 2304),
            }
    parameters = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in parameters.items()}
    assert sum(shape.size for shape in parameters.values()) == 835_051_520
    mesh = jax.sharding.AbstractMesh((1, 16, 1, 1), sharding.AXES)
    weights = {}
    for config.optimizer.moments in ("float32", "bfloat16", "int8"):
        state = jax.eval_shape(make_optimizer(config).init, parameters)
        weights[config.optimizer.moments] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = path[-1].key if leaf.ndim else ""
            if name.endswith((".a", ".b", ".projection")):  # keys are few
                split = sharding.basis_axes("column")[name.rpartition(".")[2]]
                assert sharding.spec(mesh, split, leaf.shape) == sharding.spec(mesh, split, parameters[name].shape), (
                    path,
                    leaf.shape,
                )
    assert weights["float32"] - 8 * 835_051_520 <= 8 and weights["bfloat16"] - 4 * 835_051_520 <= 8
    assert 2.06 < weights["int8"] / 835_051_520 < 2.10


def test_a_run_that_goes_on_is_the_whole_run_to_the_bit(tmp_path):
    config = line_job.get_config()
    config.optimizer.moments, config.train.steps, config.train.checkpoint_every = "int8", 8, 4
    config.train.log_images_every = 100
    train(config, tmp_path / "whole", make_job)
    config.train.steps = 4
    train(config, tmp_path / "parts", make_job)
    config.train.steps = 8
    train(config, tmp_path / "parts", make_job)
    whole, parts = (np.load(tmp_path / name / "slope.npy") for name in ("whole", "parts"))
    assert whole.tobytes() == parts.tobytes()
