"""What is planned: the functions that training or sampling runs, and their arguments as shapes in their places."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.nn import sharding
from lorweb_jax.planning.shapes import PlannedBasisJob, PlannedPairJob, batch_shapes
from lorweb_jax.training.optimizer import make_optimizer
from lorweb_jax.training.state import Partition, state_shapes
from lorweb_jax.training.step import TrainStep


class Part(NamedTuple):
    """`function(*arguments)`, jitted."""

    function: Callable
    arguments: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """Parts that run one after the other; the last is the step itself. `groups` are their arguments by what they are
    called in the table. `batch` examples at once, `steps` times the transformer; `gradients` is a tree of shapes, {}
    where there are none.

    Groups hold all that lies on the devices meanwhile, of which a part may use some."""

    what: str
    job: PlannedBasisJob | PlannedPairJob
    mesh: Mesh
    parts: tuple[Part, ...]
    groups: dict[str, Any]
    gradients: dict[str, jax.ShapeDtypeStruct]
    batch: int
    steps: int

    def traced(self, device: jax.Device | None = None) -> list[jax.stages.Traced]:
        """Of each part. device: that it is to run on, where another one stands in for it in the mesh."""
        with jax.set_mesh(self.mesh), sharding.compiling_for(device):
            return [part.function.trace(*part.arguments) for part in self.parts]


def train_program(job: PlannedBasisJob | PlannedPairJob, mesh: Mesh) -> Program:
    """One training step. UserError where batch, heads or tokens don't divide over the mesh."""
    config = job.config
    sharding.check_batch(config.train.batch, mesh, config.train.accumulate)
    for heads in job.attention_heads:
        sharding.check_heads(heads, mesh)
    sharding.check_tokens(job.sequences, mesh)
    partition, optimizer = Partition.of(job, config.seed), make_optimizer(config)
    state = state_shapes(job, partition, optimizer, config, mesh)
    frozen = partition.frozen_shapes(mesh, config.train.param_dtype)
    partition, of_blocks = partition.unstacked(job, frozen)
    batch = batch_shapes(job, mesh)
    step = TrainStep(job, partition, optimizer, config, mesh, state)
    with jax.set_mesh(mesh):
        encoded = step.encoded(of_blocks, batch)
    basis = state.trainable | state.constants
    return Program(
        "train",
        job,
        mesh,
        (Part(step.encode, (of_blocks, batch)), Part(step.update(), (state, of_blocks, encoded))),
        {"base": frozen, "basis": basis, "optimizer": (state.optimizer, state.average), "batch": encoded},
        state.trainable,
        config.train.batch,
        1,
    )


def sample_program(job: PlannedBasisJob | PlannedPairJob, mesh: Mesh) -> Program:
    """All sampling steps of one batch of config.evaluation, from latents to latents, as a training run samples the
    images that it logs.

    As in pipeline.py: for one analogy of a basis the mix is folded into a copy of the weights beforehand; for several,
    over quantised weights, and of a pair's adapters it stays beside them.
    """
    config, flux = job.config, job.folder.flux_config
    for heads in job.attention_heads:
        sharding.check_heads(heads, mesh)
    sharding.check_tokens(job.sequences, mesh)
    b, steps, size = config.evaluation.batch, config.evaluation.steps, job.size
    partition = Partition.of(job, config.seed)
    frozen = partition.frozen_shapes(mesh, config.train.param_dtype)
    basis = partition.trainable_shapes(mesh) | partition.constant_shapes(mesh)
    partition, of_blocks = partition.unstacked(job, frozen)
    folded = job.can_fold(b)

    def sample(basis, frozen, inputs, decides, sigmas):
        model = partition.model(basis, frozen)
        adapters = None if folded else job.sampling_adapters(model, decides, b)
        inputs = {"references_bsc": None} | inputs
        return model.sample(
            **inputs, guidance=jnp.float32(config.evaluation.guidance), sigmas=sigmas, size=size, adapters=adapters
        )

    split = NamedSharding(mesh, P(sharding.BATCH) if b % sharding.batch_shares(mesh) == 0 else P())
    wanted = {"noise_bsc": ((b, job.drawn, flux.in_channels), jnp.float32), **job.prompt_shapes(b)}
    if job.references:
        wanted["references_bsc"] = ((b, job.references * job.drawn, flux.in_channels), jnp.float32)
    inputs = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in wanted.items()}
    decides = job.sampling(b)
    if decides is not None:
        decides = jax.ShapeDtypeStruct(*decides, sharding=split)
    groups = {"base": frozen, "basis": basis, "batch": inputs}
    if folded:
        groups["folded weights"] = {path: frozen[f"transformer.{path}.kernel"] for path in job.folder.backbone.adapted}
    sigmas = jax.ShapeDtypeStruct((steps + 1,), jnp.float32)
    part = Part(jax.jit(sample), (basis, of_blocks, inputs, decides, sigmas))
    return Program("sample", job, mesh, (part,), groups, {}, b, steps)


PROGRAMS = {"train": train_program, "sample": sample_program}
