"""Trains the small base's autoencoder on canvases of drawings.

What the flow asks of its latents, besides a good image: a Gaussian of about unit size (a mild KL term), and that a
quadrant has the same latents alone and within a canvas (the consistency term), so that other jobs may compute
latents once a drawing and lay them side by side.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.data.drawings import Drawings, load_drawings
from lorweb_jax.data.operations import OPERATIONS, on_white
from lorweb_jax.images.levels import to_float, to_uint8
from lorweb_jax.errors import UserError
from lorweb_jax.latents.vae import AutoencoderKL, Resnet, VAEConfig
from lorweb_jax.layers import Weight
from lorweb_jax.sharding import to_host
from lorweb_jax.weights.pretrained import save_vae
from lorweb_jax.weights.safetensors_io import write_json
from lorweb_jax.weights.state import flat_state


def make(config) -> "BaseVAE":
    return BaseVAE(config)


class Canvases:
    """Endless batches {"canvas": uint8 [b, 2·size, 2·size, 3]}: 2x2 drawings, each plain or after an operation.

    A batch depends on the seed and its number only, which is the position that is saved.
    """

    def __init__(self, drawings: Drawings, batch: int, plain: float, seed: int):
        self.drawings, self.batch, self.plain, self.seed = drawings, batch, plain, seed
        self.operations = list(OPERATIONS.values())
        self.position = 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        return {"canvas": np.stack([self._canvas(rng) for _ in range(self.batch)])}

    def _canvas(self, rng: np.random.Generator) -> np.ndarray:
        a, b, c, d = (self._quadrant(rng) for _ in range(4))
        return np.block([[[a], [b]], [[c], [d]]])

    def _quadrant(self, rng: np.random.Generator) -> np.ndarray:
        drawing = self.drawings.images[rng.integers(len(self.drawings))]
        if rng.random() < self.plain:
            return on_white(drawing)
        return self.operations[rng.integers(len(self.operations))].apply(drawing)

    def get_state(self) -> dict[str, int]:
        return {"batches": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["batches"]


def quadrants(x: jax.Array) -> jax.Array:
    """[b, 2h, 2w, c] -> [4b, h, w, c], each canvas as four neighbouring entries in raster order."""
    b, h, w, c = x.shape
    return x.reshape(b, 2, h // 2, 2, w // 2, c).swapaxes(2, 3).reshape(4 * b, h // 2, w // 2, c)


def canvases(x: jax.Array) -> jax.Array:
    """Inverse of `quadrants`."""
    b, h, w, c = x.shape
    return x.reshape(b // 4, 2, 2, h, w, c).swapaxes(2, 3).reshape(b // 4, 2 * h, 2 * w, c)


def image_loss(result: jax.Array, truth: jax.Array) -> dict[str, jax.Array]:
    """Mean absolute, squared and edge (differences of neighbouring pixels, absolute) errors."""
    error = result - truth
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    return {"absolute": jnp.abs(error).mean(), "squared": jnp.square(error).mean(), "edge": edges}


class BaseVAE:
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        if config.train.batch % 2:
            raise UserError(f"config.train.batch is {config.train.batch}; the autoencoder's loss decodes one half "
                            "of a batch whole and one as quadrants: set an even number")
        self.config = config
        self.vae_config = VAEConfig(**(config.model.to_dict() | {
            "block_out_channels": tuple(config.model.block_out_channels),
            "scaling_factor": 1.0, "shift_factor": 0.0}))
        self.drawings = load_drawings(config.data.cache, config.data.size)

    def build(self, rngs: nnx.Rngs) -> AutoencoderKL:
        model = AutoencoderKL(self.vae_config, rngs=rngs)
        # Training starts with little noise on the latents and with resnets that do little: twice as fast at first.
        bias = model.encoder.conv_out.bias
        bias[...] = bias[...].at[self.vae_config.latent_channels:].set(-5.0)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, Resnet):
                module.conv2.kernel[...] *= 0.1
        return model

    def data(self, config) -> Canvases:
        return Canvases(self.drawings.part(held_out=False), config.train.batch, config.data.plain, config.seed)

    def loss(self, model, batch, key):
        weights = self.config.loss
        canvas = to_float(batch["canvas"])
        mean, logvar = model.encode(canvas)
        tiled_mean, tiled_logvar = (canvases(x) for x in model.encode(quadrants(canvas)))
        kl = 0.5 * sum((jnp.square(m) + jnp.exp(v) - 1 - v).mean() for m, v in
                       ((mean, logvar), (tiled_mean, tiled_logvar))) / 2
        consistency = jnp.square(mean - tiled_mean).mean()

        # Every other canvas is decoded from its quadrants' latents; one half of the batch is decoded whole, the
        # other as single quadrants.
        tiled = (jnp.arange(canvas.shape[0]) % 2 == 0)[:, None, None, None]
        z = jnp.where(tiled, tiled_mean, mean)
        z = z + jnp.exp(0.5 * jnp.where(tiled, tiled_logvar, logvar)) * jax.random.normal(key, z.shape)
        half = canvas.shape[0] // 2
        result = jnp.concatenate([model.decode(z[:half]), canvases(model.decode(quadrants(z[half:])))])
        parts = image_loss(result, canvas) | {"kl": kl, "consistency": consistency}
        loss = sum(weights[name] * value for name, value in parts.items())
        return loss, parts | {"psnr": 10 * jnp.log10(4 / parts["squared"])}

    def show(self, model, step: int) -> dict[str, np.ndarray]:
        """Held-out drawings, plain and after operations: an image and its reconstruction one above the other."""
        examples = self._held_out(batch=6, plain=0.5)
        result = np.asarray(to_uint8(_reconstruct(model, to_float(examples))))
        sheet = np.concatenate([np.concatenate(list(examples), 1), np.concatenate(list(result), 1)])
        return {"held_out": sheet.repeat(3, 0).repeat(3, 1)}

    def finish(self, model, workdir: Path) -> None:
        """Writes `workdir`/vae, with shift and scale that give latents mean 0 and deviation 1, and its quality."""
        sample = Canvases(self.drawings.part(held_out=False), 256, self.config.data.plain, self.config.seed + 1)
        latents = to_host(jax.jit(lambda model, x: model.encode(x)[0])(model, to_float(next(sample)["canvas"])))
        config = self.vae_config.to_json() | {
            "scaling_factor": round(float(1 / latents.std()), 4), "shift_factor": round(float(latents.mean()), 4)}
        save_vae(workdir / "vae", config, flat_state(model), np.float16)  # for a repository; it computes in float32

        quality = {"deviation_of_channels": latents.std((0, 1, 2)).round(3).tolist()}
        for name, plain in (("plain", 1.0), ("edited", 0.0)):
            examples = self._held_out(batch=60, plain=plain)
            quality[f"psnr_held_out_{name}"] = psnr(to_uint8(_reconstruct(model, to_float(examples))), examples)
            single = np.asarray(quadrants(examples))
            quality[f"psnr_held_out_{name}_single"] = psnr(to_uint8(_reconstruct(model, to_float(single))), single)
        write_json(workdir / "quality.json", quality)
        print(json.dumps(quality, indent=1))

    def _held_out(self, batch: int, plain: float) -> np.ndarray:
        return next(Canvases(self.drawings.part(held_out=True), batch, plain, seed=0))["canvas"]


@nnx.jit
def _reconstruct(model: AutoencoderKL, image: jax.Array) -> jax.Array:
    return model.decode(model.encode(image)[0])


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, from the squared error over all of them."""
    error = np.square(result.astype(np.float64) - truth).mean()
    return round(float(10 * np.log10(255**2 / error)), 2)
