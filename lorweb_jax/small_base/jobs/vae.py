"""Trains the small base's autoencoder on canvases of drawings (small_base/autoencoder.py has the loss)."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.fingerprint import of_folder
from lorweb_jax.data.embedded.drawing_sets import load_sets
from lorweb_jax.data.embedded.operations import OPERATIONS, on_white
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.files.state import differences, flat_state
from lorweb_jax.images.levels import to_float, to_uint8
from lorweb_jax.models.autoencoder.model import AutoencoderKL
from lorweb_jax.nn.layers import Weight
from lorweb_jax.nn.sharding import to_host
from lorweb_jax.pipeline.pretrained import load_vae, save_vae
from lorweb_jax.small_base.autoencoder import autoencoder_config, autoencoder_loss, enlarged, new_autoencoder, quadrants
from lorweb_jax.small_base.captions import Captions
from lorweb_jax.small_base.corpus import Corpus, canvas_of, draw_canvases, make_corpus, some
from lorweb_jax.training.job import Job, NumberedBatches


def make(config) -> "BaseVAE":
    return BaseVAE(config)


class Canvases(NumberedBatches):
    """Endless batches {"canvas": uint8 [b, 2·size, 2·size, 3]}: four drawings, each plain or after an operation, or one
    enlarged.

    A batch depends on the seed and its number only, which is the position that is saved.
    """

    def __init__(self, images: np.ndarray, corpus: Corpus, batch: int, plain: float, enlarged: float, seed: int):
        self.images, self.seed, self.position = images, seed, 0
        self.effects = [on_white, *(operation.apply for operation in OPERATIONS.values())]
        self.draw = jax.jit(lambda key: draw_canvases(key, corpus, batch, plain, enlarged))

    def at(self, number: int) -> dict[str, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        picture, alone = jax.device_get(self.draw(key))
        drawings = np.stack(
            [
                [self.effects[effect](self.images[drawing]) for drawing, effect in zip(*four)]
                for four in zip(picture.drawing, picture.operation)
            ]
        )
        canvas = canvas_of(drawings)
        if alone.any():
            canvas[alone] = np.asarray(enlarged(drawings[alone, 0]))
        return {"canvas": canvas}


class BaseVAE(Job):
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        if config.train.batch % 2:
            raise UserError(
                f"config.train.batch is {config.train.batch}; the autoencoder's loss decodes one half "
                "of a batch whole and one as quadrants: set an even number"
            )
        self.config = config
        self.vae_config = autoencoder_config(config)
        drawings = load_sets(config.data.drawings)
        self.drawings = some(drawings, config.data.signs) if config.data.signs else drawings
        self.corpora = {held_out: make_corpus(self.drawings, Captions(), 1, held_out) for held_out in (False, True)}

    def build(self, rngs: nnx.Rngs) -> AutoencoderKL:
        return new_autoencoder(self.vae_config, rngs)

    def initial(self, shapes) -> dict[str, np.ndarray]:
        """The weights in config.initial's folder, of all `shapes`; none where no folder is given."""
        if not self.config.initial:
            return {}
        _, weights = load_vae(self.config.initial)
        weights = {name: np.asarray(weights[name], np.float32) for name in weights}
        if lines := differences(
            {name: array.shape for name, array in weights.items()},
            {name: shape.shape for name, shape in shapes.items()},
        ):
            raise UserError(
                f"the autoencoder in {self.config.initial} doesn't fit config.model ({lines[0]}); set "
                "config.model as its config.json says, or choose another config.initial"
            )
        return weights

    def sources(self) -> dict[str, str]:
        return {"initial": of_folder(self.config.initial)} if self.config.initial else {}

    def canvases(
        self, batch: int, plain: float, seed: int, *, enlarged: float = 0.0, held_out: bool = False
    ) -> Canvases:
        return Canvases(self.drawings.images, self.corpora[held_out], batch, plain, enlarged, seed)

    def data(self, config) -> Canvases:
        return self.canvases(config.train.batch, config.data.plain, config.seed, enlarged=config.data.enlarged)

    def loss(self, model, batch, key):
        return autoencoder_loss(model, batch["canvas"], key, self.config.loss)

    def log_images(self, model, step: int) -> dict[str, np.ndarray]:
        """Held-out drawings, plain and after operations: an image and its reconstruction one above the other."""
        examples = self._held_out(batch=6, plain=0.5)
        result = np.asarray(to_uint8(_reconstruct(model, to_float(examples))))
        sheet = np.concatenate([np.concatenate(list(examples), 1), np.concatenate(list(result), 1)])
        return {"held_out": sheet.repeat(2, 0).repeat(2, 1)}

    def finish(self, model, workdir: Path) -> None:
        """Writes `workdir`/vae, with shift and scale that give latents mean 0 and deviation 1, and its quality."""
        sample = next(self.canvases(128, self.config.data.plain, self.config.seed + 1))["canvas"]
        latents = to_host(jax.jit(lambda model, x: model.encode(x)[0])(model, to_float(sample)))
        write_autoencoder(workdir, self, model, float(1 / latents.std()), float(latents.mean()))

    def _held_out(self, batch: int, plain: float) -> np.ndarray:
        return next(self.canvases(batch, plain, seed=0, held_out=True))["canvas"]


def write_autoencoder(workdir: Path, job: BaseVAE, model: AutoencoderKL, scale: float, shift: float) -> None:
    """`workdir`/vae in float16, for a repository (it computes in float32), and quality.json."""
    config = job.vae_config.to_json() | {"scaling_factor": round(scale, 4), "shift_factor": round(shift, 4)}
    save_vae(workdir / "vae", config, flat_state(model), np.float16)
    quality = {}
    for name, plain in (("plain", 1.0), ("edited", 0.0)):
        examples = job._held_out(batch=60, plain=plain)
        quality[f"psnr_held_out_{name}"] = psnr(to_uint8(_reconstruct(model, to_float(examples))), examples)
        single = np.asarray(quadrants(jnp.asarray(examples)))
        quality[f"psnr_held_out_{name}_single"] = psnr(to_uint8(_reconstruct(model, to_float(single))), single)
    write_json(workdir / "quality.json", quality)
    print(json.dumps(quality, indent=1))


@nnx.jit
def _reconstruct(model: AutoencoderKL, image: jax.Array) -> jax.Array:
    return model.decode(model.encode(image)[0])


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 images, from the squared error over all of them."""
    error = np.square(result.astype(np.float64) - truth).mean()
    return round(float(10 * np.log10(255**2 / error)), 2)
