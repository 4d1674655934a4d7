"""A small FLUX with a routed basis, or with a pair of adapters, as a training job, and three steps of it on any mesh:
what test_mesh.py compares.

Run as a program it prints, for each mesh given as data,fsdp,sequence,tensor, where its arrays end up, as .npz files. Of
a mesh with "pair," before it, it is the pair, with "blocks," that with blocks of their own, with "offload," the basis
beside blocks in the host's memory.
"""

import functools
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import pair as pair_config
from lorweb_jax.adapters.basis import Basis, BasisConfig, BasisParam
from lorweb_jax.jobs.pair import PairJob
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.nn import sharding
from lorweb_jax.pipeline.pair_model import PairModel
from lorweb_jax.pipeline.pair_run import make_members
from lorweb_jax.settings.config import base_config
from lorweb_jax.training.job import Job
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import Partition, frozen_weights, new_state, state_shapes
from lorweb_jax.training.step import TrainStep

FLUX = FluxConfig(
    in_channels=16,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=8,
    num_attention_heads=8,
    joint_attention_dim=24,
    pooled_projection_dim=12,
    axes_dims_rope=(2, 2, 4),
)
BATCH, TOKENS, TEXT, QUERY = 8, 6, 6, 20
# Layers with a basis: of each stack one of every role and stream. More take longer to compile and are split no other
# way.
ADAPTED = ("norm1.linear", "attn.to_q", "add_q_proj", "ff.net_2", "to_add_out", "s.norm.linear", "s.proj_out")


class Model(nnx.Module):
    def __init__(self, quantization: str, rngs: nnx.Rngs):
        self.transformer = Flux(FLUX, remat="full", quantization=quantization, rngs=rngs)
        layers = {path: layer for path, layer in backbone(FLUX).adapted.items() if path.endswith(ADAPTED)}
        self.basis = Basis(BasisConfig(size=8, rank=2, key_dim=16, query_dim=QUERY), layers, rngs=rngs)


class OnePartition:
    """Of a job that is trained on several meshes: its model is traced once."""

    @functools.cached_property
    def partition(self) -> Partition:
        return Partition.of(self, self.config.seed)


class MeshJob(OnePartition, Job):
    trainable = BasisParam

    def __init__(self, quantization: str = "none"):
        self.quantization, self.config = quantization, base_config("mesh")

    def build(self, rngs):
        return Model(self.quantization, rngs)

    def frozen(self, shapes):
        return random_arrays(shapes)

    def loss(self, model, batch, key):
        adapters = model.basis.adapters(model.basis.coefficients(batch["query"]))
        ids = jnp.stack([jnp.arange(TOKENS)] * 3, axis=-1)
        velocity = model.transformer(
            batch["hidden"],
            batch["text"],
            batch["pooled"],
            batch["time"],
            jnp.ones(BATCH),
            ids,
            jnp.zeros((TEXT, 3)),
            adapters,
        )
        noise = jax.random.normal(key, velocity.shape)
        return jnp.square(velocity - batch["target"] - noise).mean(), {}


class OffloadedJob(MeshJob):
    offloaded = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")


class MeshPair(OnePartition, PairJob):
    """Its batches are latents, in two micro-batches, with both passes from the first step."""

    joint = False

    def __init__(self):
        layers = backbone(FLUX).adapted
        self.config = pair_config.default()
        self.config.pair.update(content_rank=8, style_rank=4, style_start=0, times="example")
        self.config.train.update(batch=2 * BATCH, accumulate=2)
        self.members = nnx.eval_shape(lambda: make_members(self.config.pair, layers))
        self.folder = SimpleNamespace(vae_config=SimpleNamespace(downscale=8))

    def build(self, rngs):
        return PairModel(
            backbone=backbone(FLUX),
            transformer=Flux(FLUX, remat="full", rngs=rngs),
            vae=SimpleNamespace(config=self.folder.vae_config),
            members=make_members(self.config.pair, backbone(FLUX).adapted),
            text=jnp.zeros((2, TEXT, 24)),
            pooled=jnp.zeros((2, 12)),
        )

    def frozen(self, shapes):
        return random_arrays(shapes)

    def encode(self, model, batch):
        return {}


class UnstackedPair(MeshPair):
    def unstack(self, model):
        model.transformer.unstack()


def latents():
    random = np.random.default_rng(4)
    for _ in range(3):
        mean, deviation = (random.normal(size=(2 * BATCH, 2, 4, 6, 4)).astype(np.float32) for _ in range(2))
        yield {"mean": mean, "deviation": 0.1 * np.abs(deviation)}


def random_arrays(shapes):
    """Nothing is zero, as a fresh model's modulations and B are, so that every part of the model matters."""
    random, made = np.random.default_rng(0), {}
    for name, shape in sorted(shapes.items()):
        if np.issubdtype(shape.dtype, np.integer):
            made[name] = random.integers(-127, 128, shape.shape, np.int8)
        else:
            size = {"scale": 1e-3 if name.endswith("linear.scale") else 1.0, "keys": 1.0, "b": 0.3}.get(
                name.split(".")[-1], 0.1
            )
            made[name] = (
                size * (1 + 0.1 * random.normal(size=shape.shape))
                if name.endswith("scale")
                else random.normal(0, size, shape.shape)
            ).astype(np.float32)
    return made


def batches():
    # Adam divides a gradient by its own size: an entry that all but vanishes takes what rounding makes of it. In this
    # draw none does; in others one of thousands, which alone is then 1e-5 of its array apart.
    random = np.random.default_rng(4)
    shapes = dict(hidden=(TOKENS, 16), text=(TEXT, 24), pooled=(12,), query=(QUERY,), target=(TOKENS, 16))
    for _ in range(3):
        yield {name: random.normal(size=(BATCH, *shape)).astype(np.float32) for name, shape in shapes.items()} | {
            "time": random.uniform(size=BATCH).astype(np.float32)
        }


def three_steps(sizes: dict[str, int], job: MeshJob | MeshPair) -> dict[str, np.ndarray]:
    """Trained arrays after three steps, "loss" [3], and "share/<path>": a device's share of each parameter."""
    jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longer than what is computed
    config, partition = job.config, job.partition
    optimizer, mesh = make_optimizer(config), sharding.make_mesh(sizes)
    shapes = state_shapes(job, partition, optimizer, config, mesh)
    frozen = frozen_weights(job, partition.frozen_shapes(mesh, config.train.param_dtype), config)
    trainable, constants = (
        {name: sharding.put(array, part[name]) for name, array in random_arrays(part).items()}
        for part in (shapes.trainable, shapes.constants)
    )
    state = jax.jit(
        lambda *parts: new_state(job, partition, optimizer, config, *parts), out_shardings=sharding.shardings_of(shapes)
    )(trainable, constants)
    share = _shares(state.trainable | state.constants | frozen)
    partition, frozen = partition.unstacked(job, frozen)
    losses = []
    with jax.set_mesh(mesh):
        step = TrainStep(job, partition, optimizer, config, mesh, shapes)
        for number, batch in enumerate(latents() if isinstance(job, MeshPair) else batches()):
            state, metrics = step(number, state, frozen, sharding.put_batch(mesh, batch))
            losses.append(float(metrics["loss"]))
    trained = {name: np.asarray(array) for name, array in state.trainable.items()}
    return trained | {"loss": np.array(losses)} | share | _shares(state.trainable | frozen)


def _shares(arrays: dict[str, jax.Array]) -> dict[str, float]:
    """ "share/<path>": a device's share of each array."""
    return {
        f"share/{name}": array.addressable_shards[0].data.size / array.size
        for name, array in arrays.items()
        if not array.is_deleted()
    }


if __name__ == "__main__":
    out, *meshes = sys.argv[1:]
    jobs = {"": MeshJob(), "pair": MeshPair(), "blocks": UnstackedPair(), "offload": OffloadedJob()}
    for mesh in meshes:
        *kind, data, fsdp, sequence, tensor = mesh.split(",")
        sizes = dict(zip(sharding.AXES, map(int, (data, fsdp, sequence, tensor))))
        np.savez(Path(out) / f"{mesh}.npz", **three_steps(sizes, jobs["".join(kind)]))
