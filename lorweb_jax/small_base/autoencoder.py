"""The loss of the small base's autoencoder.

Beside reconstruction, the flow model needs latents that are roughly unit Gaussian (a mild KL term), and a quadrant with
the same latents alone as within a canvas (the consistency term), so that each drawing's latents are computed once and
laid side by side.
"""

import operator
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.images.levels import to_float
from lorweb_jax.models.autoencoder.model import AutoencoderKL, Resnet, VAEConfig


def autoencoder_config(config) -> VAEConfig:
    """From configs/base_vae.py; scale and shift are measured at the end."""
    return VAEConfig(
        **(
            dict(config.model)
            | {
                "block_out_channels": tuple(config.model["block_out_channels"]),
                "scaling_factor": 1.0,
                "shift_factor": 0.0,
            }
        )
    )


def new_autoencoder(config: VAEConfig, rngs: nnx.Rngs) -> AutoencoderKL:
    model = AutoencoderKL(config, rngs=rngs)
    # Training starts with little noise on the latents and with resnets that do little: twice as fast at first.
    bias = model.encoder.conv_out.bias
    bias[...] = bias[...].at[config.latent_channels :].set(-5.0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Resnet):
            module.conv2.kernel[...] *= 0.1
    return model


def quadrants(x: jax.Array) -> jax.Array:
    """[b, 2h, 2w, c] -> [4b, h, w, c], each canvas as four neighbouring entries in raster order."""
    b, h, w, c = x.shape
    return x.reshape(b, 2, h // 2, 2, w // 2, c).swapaxes(2, 3).reshape(4 * b, h // 2, w // 2, c)


def canvases(x: jax.Array) -> jax.Array:
    """Inverse of `quadrants`."""
    b, h, w, c = x.shape
    return x.reshape(b // 4, 2, 2, h, w, c).swapaxes(2, 3).reshape(b // 4, 2 * h, 2 * w, c)


def enlarged(images: jax.Array) -> jax.Array:
    """uint8 [b, h, w, 3] -> uint8 [b, 2h, 2w, 3], bicubic."""
    b, h, w, c = images.shape
    large = jax.image.resize(images.astype(jnp.float32), (b, 2 * h, 2 * w, c), "cubic")
    return jnp.clip(jnp.round(large), 0, 255).astype(jnp.uint8)


def image_loss(result: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    """Mean absolute, squared and edge (differences of neighbouring pixels, absolute) errors."""
    error = result - truth
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return {"absolute": jnp.abs(error).mean(), "squared": jnp.square(error).mean(), "edge": edges}


def autoencoder_loss(
    model: AutoencoderKL, canvas: jax.Array, key: jax.Array, weights, dtype: Any = jnp.float32
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, its parts and the PSNR) of canvases uint8 [b, 2h, 2w, 3], b even; convolutions compute in `dtype`.

    weights: config.loss of configs/base_vae.py.
    """
    canvas = to_float(canvas)

    def encode(images):
        return tuple(x.astype(jnp.float32) for x in model.encode(images.astype(dtype)))

    def decode(latents):
        return model.decode(latents.astype(dtype)).astype(jnp.float32)

    mean, logvar = encode(canvas)
    tiled_mean, tiled_logvar = (canvases(x) for x in encode(quadrants(canvas)))
    whole, parted = (
        (jnp.square(m) + jnp.exp(v) - 1 - v).mean() for m, v in ((mean, logvar), (tiled_mean, tiled_logvar))
    )
    kl = 0.5 * (whole + parted) / 2
    consistency = jnp.square(mean - tiled_mean).mean()

    # Every other canvas is decoded from its quadrants' latents; one half of the batch is decoded whole, the
    # other as single quadrants.
    tiled = (jnp.arange(canvas.shape[0]) % 2 == 0)[:, None, None, None]
    z = jnp.where(tiled, tiled_mean, mean)
    z = z + jnp.exp(0.5 * jnp.where(tiled, tiled_logvar, logvar)) * jax.random.normal(key, z.shape)
    half = canvas.shape[0] // 2
    result = jnp.concatenate([decode(z[:half]), canvases(decode(quadrants(z[half:])))])
    parts = image_loss(result, canvas) | {"kl": kl, "consistency": consistency}
    loss = reduce(operator.add, [weights[name] * value for name, value in parts.items()])
    return loss, parts | {"psnr": 10 * jnp.log10(4 / parts["squared"])}
