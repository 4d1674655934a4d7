"""What is planned: the function that training or sampling runs, and its arguments as shapes in their places."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from lorweb_jax import sharding
from lorweb_jax.planning import shapes as planned
from lorweb_jax.training.jobs.basis import BasisJob
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import Layout, StateShapes
from lorweb_jax.training.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """`function(*arguments)`, jitted; `groups` are the arguments by what they are called in the table. `batch`
    examples at once, `steps` times the transformer; `gradients` is a tree of shapes, {} where there are none."""

    what: str
    job: BasisJob
    mesh: Mesh
    function: Callable
    arguments: tuple[Any, ...]
    groups: dict[str, Any]
    gradients: dict[str, jax.ShapeDtypeStruct]
    batch: int
    steps: int

    def traced(self) -> jax.stages.Traced:
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments)


def train_program(job: BasisJob, mesh: Mesh) -> Program:
    """One training step. UserError where batch or heads don't divide over the mesh."""
    config = job.config
    sharding.check_batch(config.train.batch, mesh)
    sharding.check_heads(job.folder.flux_config.num_attention_heads, mesh)
    layout, optimizer = Layout.of(job, config.seed), make_optimizer(config)
    state = StateShapes.of(layout, optimizer, config, mesh)
    batch = planned.batch_shapes(job, mesh)
    step = jax.ShapeDtypeStruct((), np.uint32)
    return Program("train", job, mesh, jit_train_step(job, layout, optimizer, config.seed, mesh, state),
                   (state.trainable, state.opt_state, state.frozen, batch, step),
                   {"base": state.frozen, "basis": state.trainable, "optimizer": state.opt_state, "batch": batch},
                   state.trainable, config.train.batch, 1)


def sample_program(job: BasisJob, mesh: Mesh) -> Program:
    """All sampling steps of one batch of config.show, from the condition's latents to the result's.

    As in pipeline.py: for one analogy the mix is folded into the weights beforehand, for several it stays beside them.
    """
    config, flux = job.config, job.folder.flux_config
    sharding.check_heads(flux.num_attention_heads, mesh)
    b, steps, size = config.show.batch, config.show.steps, planned.grid_size(config)
    layout = Layout.of(job, config.seed)
    folded = b == 1 and job.basis_config.query != "internal"
    used = {path: shape for path, shape in layout.shapes("frozen", mesh, config.train.frozen_dtype).items()
            if path.startswith(("transformer.", "vae."))}
    trainable = {} if folded else layout.shapes("trainable", mesh, jnp.float32)
    unused = {path: jnp.zeros((), shape.dtype) for path, shape in layout.shapes("frozen", mesh, jnp.float32).items()
              if path not in used}
    missing = {} if trainable else {path: jnp.zeros(()) for path in layout.trainable}

    def sample(trainable, frozen, inputs, sigmas):
        model = layout.model(trainable | missing, frozen | unused)
        query = inputs.pop("query", None)
        additions = model.additions(query, b) if trainable else None
        return model.sample(**inputs, guidance=jnp.float32(config.show.guidance), sigmas=sigmas, size=size,
                            additions=additions)

    noise = ((b, planned.tokens(job), flux.in_channels), jnp.float32)
    wanted = {"noise_bsc": noise, "condition_bsc": noise, **planned.prompt_shapes(job, b)}
    if job.basis_config.query == "external" and trainable:
        wanted["query"] = ((b, planned.query_width(job)), jnp.float32)
    split = NamedSharding(mesh, P(sharding.BATCH) if b % sharding.batch_shares(mesh) == 0 else P())
    inputs = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in wanted.items()}
    sigmas = jax.ShapeDtypeStruct((steps + 1,), jnp.float32)
    groups = {"base": used, "basis": trainable, "batch": inputs}
    return Program("sample", job, mesh, jax.jit(sample), (trainable, used, inputs, sigmas), groups, {}, b, steps)


PROGRAMS = {"train": train_program, "sample": sample_program}
