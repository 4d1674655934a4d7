"""Noise levels, Euler steps, noising and the loss against the golden data and diffusers' scheduler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import golden_dir

from lorweb_jax.flow.loss import add_noise, draw, weighted_mse
from lorweb_jax.flow.sampling import euler
from lorweb_jax.flow.schedule import Schedule, bell_weights, train_timesteps, train_weights
from lorweb_jax.models.flux1.packing import pack, position_ids, text_ids, unpack

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden():
    with np.load(golden_dir() / "scheduler.npz") as file:
        return dict(file)


def test_noise_levels_equal_golden(golden):
    schedule = Schedule()
    names = [key.removesuffix("/sigmas") for key in golden if key.endswith("/sigmas") and key.startswith("n")]
    assert len(names) == 12
    for name in names:
        steps, tokens = map(int, re.fullmatch(r"n(\d+)_L(\d+)", name).groups())
        assert abs(schedule.shift(tokens) - golden[f"{name}/mu"]) <= 1e-12
        sigmas = schedule.sigmas(steps, tokens)
        assert sigmas.dtype == np.float32
        np.testing.assert_allclose(sigmas, golden[f"{name}/sigmas"], rtol=TOLERANCE)
        np.testing.assert_allclose(1000 * sigmas[:-1], golden[f"{name}/timesteps"], rtol=TOLERANCE)


@pytest.mark.parametrize("steps,tokens", [(1, 256), (7, 100), (13, 3000)])
def test_noise_levels_equal_diffusers(steps, tokens):
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.4, max_shift=1.3
    )
    ours = Schedule.from_json(dict(scheduler.config))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=ours.shift(tokens))
    np.testing.assert_allclose(ours.sigmas(steps, tokens), scheduler.sigmas.numpy(), rtol=TOLERANCE)
    assert (ours.base_shift, ours.max_shift) == (0.4, 1.3)


def test_euler_steps_equal_golden(golden):
    """Four recorded velocities, which the sampling loop is handed one by one through the noise level."""
    sigmas = Schedule().sigmas(4, 64)
    velocities = jnp.stack([golden[f"step/v{step}"] for step in range(4)])

    def recorded(z, sigma):
        return velocities[jnp.argmin(jnp.abs(sigmas[:-1] - sigma[0]))]

    for steps in range(1, 5):
        z = jax.jit(lambda z, n=steps: euler(recorded, z, jnp.asarray(sigmas[: n + 1])))(golden["step/x0"])
        expected = golden[f"step/x{steps}"]
        assert np.abs(z - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_training_tables_equal_golden(golden):
    np.testing.assert_array_equal(train_timesteps(), golden["train/timesteps_weighted"])
    np.testing.assert_allclose(bell_weights(), golden["train/weights_weighted_v2False"], atol=TOLERANCE)
    np.testing.assert_array_equal(train_weights("uniform"), np.ones(1000))
    for index in range(2):
        parts = [golden[f"train/add_noise_{part}"][index].reshape(1, 1, -1) for part in ("x0", "noise")]
        found = add_noise(*parts, golden["train/add_noise_t"][index : index + 1] / 1000)
        np.testing.assert_allclose(found.ravel(), golden[f"train/add_noise_{index}"].ravel(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group", ["B1", "B2"])
def test_loss_equals_golden(group):
    with np.load(golden_dir() / "train_step.npz") as file:
        step = {key.removeprefix(f"{group}/"): file[key] for key in file.files if key.startswith(f"{group}/")}
    batch = len(step["latents"])
    x0, noise, velocity = (
        pack(jnp.asarray(step[name][:batch]).transpose(0, 2, 3, 1)) for name in ("latents", "noise", "noise_pred")
    )
    noisy = unpack(add_noise(x0, noise, step["timesteps"] / 1000), 8, 12).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(noisy, step["noisy"], rtol=1e-5, atol=1e-6)
    weights = bell_weights()[1000 - step["timesteps"].astype(int)]
    loss, per_example = weighted_mse(velocity, noise - x0, weights)
    np.testing.assert_allclose(loss, step["loss"], rtol=TOLERANCE)
    np.testing.assert_allclose(per_example, step["loss_per_sample"][:batch], rtol=TOLERANCE)


def test_drawn_examples():
    x0 = jax.random.normal(jax.random.key(0), (4096, 2, 3))
    timesteps, weights = train_timesteps(), train_weights("bell")
    noised = draw(jax.random.key(1), x0, timesteps, weights)
    t = np.asarray(noised.time_b)
    assert 0.001 <= t.min() and t.max() <= 1 and abs(t.mean() - 0.5005) < 0.02
    np.testing.assert_array_equal(noised.weight_b, weights[np.round(1000 - 1000 * t).astype(int)])
    noise = noised.target_bsc + x0
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_allclose(noised.tokens_bsc, x0 + t[:, None, None] * noised.target_bsc, atol=1e-5)


def test_packing_and_ids_equal_diffusers():
    pipeline = pytest.importorskip("diffusers").FluxKontextPipeline
    import torch

    latents = np.random.default_rng(0).normal(size=(2, 6, 10, 16)).astype(np.float32)
    theirs = pipeline._pack_latents(torch.tensor(latents.transpose(0, 3, 1, 2)), 2, 16, 6, 10)
    np.testing.assert_array_equal(pack(jnp.asarray(latents)), theirs.numpy())
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(latents)), 6, 10), latents)
    ids = pipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32).numpy()
    np.testing.assert_array_equal(position_ids(6, 10, 0), ids)
    np.testing.assert_array_equal(position_ids(6, 10, 1), ids + [1, 0, 0])
    assert text_ids(7).shape == (7, 3) and not text_ids(7).any()
