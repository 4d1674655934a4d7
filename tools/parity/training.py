"""train_step.npz: one training step from latents to loss and gradients."""

import functools

import jax.numpy as jnp
import numpy as np

from lorweb_jax.flow.loss import add_noise, weighted_mse
from lorweb_jax.flow.schedule import TRAIN_STEPS, bell_weights
from lorweb_jax.models.flux1.packing import pack, position_ids, text_ids, unpack
from parity.folder import Bases, RecordedModels, Recording, groups
from parity.report import GRADIENT, OUTPUT, Comparison
from parity.transformer import Inputs, adapters_of, gradient_of, loss_and_gradients, velocity

_GUIDANCE = 1.0


def tokens(latents_bchw: np.ndarray):
    return pack(jnp.asarray(latents_bchw).transpose(0, 2, 3, 1))


def latents(tokens_bsc, height: int, width: int):
    """[b, c, height, width]"""
    return unpack(jnp.asarray(tokens_bsc), height, width).transpose(0, 3, 1, 2)


def check_train_step(report: Comparison, name: str, data: Recording, bases: Bases, models: RecordedModels) -> None:
    for group, arrays in groups(data).items():
        _check_group(report, f"{name} {group}", arrays, bases, models)


def _check_group(report: Comparison, name: str, data: Recording, bases: Bases, models: RecordedModels) -> None:
    def has(*keys):
        return all(key in data for key in keys)

    def compare(key, ours, tolerance=OUTPUT):
        def as_published():
            # Published losses of a single example hold the same row twice.
            found = np.asarray(ours())
            return np.broadcast_to(found, data[key].shape) if found.shape[:1] == (1,) else found

        report.compare(f"{name}/{key}", as_published, data[key], tolerance)

    if has("noisy", "latents", "noise", "timesteps"):
        height, width = data["noisy"].shape[2:]
        compare(
            "noisy",
            lambda: latents(
                add_noise(tokens(data["latents"]), tokens(data["noise"]), data["timesteps"] / TRAIN_STEPS),
                height,
                width,
            ),
        )
    if has("target", "latents", "noise"):
        compare("target", lambda: data["noise"] - data["latents"])
    if has("weights", "timesteps"):
        compare("weights", lambda: bell_weights()[TRAIN_STEPS - np.round(data["timesteps"]).astype(int)])
    if has("noise_pred", "target", "weights"):

        @functools.cache
        def losses():
            return weighted_mse(tokens(data["noise_pred"]), tokens(data["target"]), data["weights"])

        for index, key in enumerate(("loss", "loss_per_sample")):
            if key in data:
                compare(key, lambda index=index: losses()[index])
    if has("noisy", "control_latents", "text_embeds", "pooled_embeds", "timesteps"):
        _check_model(report, name, data, bases, models, compare)


def _check_model(report: Comparison, name: str, data: Recording, bases: Bases, models: RecordedModels, compare) -> None:
    height, width = data["noisy"].shape[2:]
    query = data.get("external_query")
    time = (data["timesteps"] / TRAIN_STEPS).astype(np.float32)
    hidden = jnp.concatenate([tokens(data["noisy"]), tokens(data["control_latents"])], axis=1)
    ids = jnp.concatenate([position_ids(height, width, 0), position_ids(*data["control_latents"].shape[2:], 1)])
    inputs = Inputs(
        hidden,
        data["text_embeds"],
        data["pooled_embeds"],
        time,
        np.full_like(time, _GUIDANCE),
        ids,
        text_ids(data["text_embeds"].shape[1]),
    )
    noisy_tokens = (height // 2) * (width // 2)

    if "noise_pred" in data:
        compare(
            "noise_pred",
            lambda: latents(
                velocity(models.transformer, inputs, adapters_of(bases.default().basis, query))[:, :noisy_tokens],
                height,
                width,
            ),
        )
    gradients = [key for key in data if key.startswith("grad/")]
    if not gradients or "target" not in data or "weights" not in data:
        return

    @functools.cache
    def gradient():
        return loss_and_gradients(
            models.transformer, bases.default().basis, query, inputs, _loss, tokens(data["target"]), data["weights"]
        )[1]

    for key in gradients:
        compare(key, lambda key=key: gradient_of(gradient(), key.removeprefix("grad/")), GRADIENT)


def _loss(velocity_bsc, target_bsc, weight_b):
    return weighted_mse(velocity_bsc[:, : target_bsc.shape[1]], target_bsc, weight_b)[0]
