"""A tiny training job for the tests of the loop: a line through noisy points, one part frozen."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.nn.sharding import to_host
from lorweb_jax.settings.config import base_config, choose_variant
from lorweb_jax.training.job import Batches, Job


def get_config(variant: str = ""):
    return choose_variant({"": default, "average": average}, variant)


def default():
    config = base_config("line_job:make")
    config.seed = 3
    config.train.steps = 24
    config.train.batch = 8
    config.train.log_every = 1
    config.train.checkpoint_every = 5
    config.train.log_images_every = 12
    config.optimizer.learning_rate = 0.05
    config.line = {"bad_step": -1, "pause": 0.0}
    return config


def average():
    config = default()
    config.train.ema = 0.9
    return config


class Slope(nnx.Param):
    """What is trained."""


class Line(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.slope = Slope(jax.random.normal(rngs.params(), (4, 4)))
        self.frozen = nnx.Dict({"a.b": nnx.Param(jnp.zeros((4,)))})

    def __call__(self, x):
        return x @ self.slope[...] + self.frozen["a.b"][...]


class Points(Batches):
    """Batches drawn from (seed, position)."""

    def __init__(self, config):
        self.config, self.position = config, 0

    def __next__(self):
        time.sleep(self.config.line.pause)
        rng = np.random.default_rng((self.config.seed, self.position))
        x = rng.normal(size=(self.config.train.batch, 4)).astype(np.float32)
        if self.position == self.config.line.bad_step:
            x[0, 0] = np.nan
        self.position += 1
        return {"x": x, "caption": ["a point"] * len(x)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class LineJob(Job):
    trainable = Slope

    def build(self, rngs):
        return Line(rngs)

    def frozen(self, shapes):
        return {name: np.full(shape.shape, 0.5, np.float32) for name, shape in shapes.items()}

    def data(self, config):
        return Points(config)

    def loss(self, model, batch, key):
        noise = 0.1 * jax.random.normal(key, batch["x"].shape)
        error = model(batch["x"]) - (batch["x"][:, ::-1] + noise)
        return jnp.square(error).mean(), {"largest": jnp.abs(error).max()}

    def log_images(self, model, step):
        return {"slope": np.zeros((8, 8, 3), np.uint8)}

    def finish(self, model, workdir: Path):
        np.save(workdir / "slope.npy", to_host(model.slope[...]))


def make(config):
    return LineJob()
