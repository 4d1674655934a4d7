"""A training job's model and batch as shapes: no weights, no data, no files but configs.

Letters: b batch, v views, t text tokens, j their width, p pooled width, q query width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.adapters.basis import BasisConfig
from lorweb_jax.common.errors import UserError
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.nn import sharding
from lorweb_jax.nn.attention import resolve
from lorweb_jax.pipeline.published import open_pipeline
from lorweb_jax.precomputed.scope import Scope
from lorweb_jax.training.state import Shapes


class PlannedBasisJob(BasisJob):
    """The basis's job, of which only `build` and `loss` are wanted: it opens no data."""

    def __init__(self, config, platform: str):
        self.config = config
        self.basis_config = self.signed_config = BasisConfig(**config.basis)  # there may be no weights to sign with
        self.folder = open_pipeline(config.pipeline, config.basis.encoder)
        # For the devices that are planned for, not for those of this machine.
        self.planned_attention = resolve(
            config.attention, platform, jnp.dtype(config.compute_dtype), self.folder.flux_config.attention_head_dim
        )
        # cuDNN's can't even be traced where it isn't.
        self.attention = {"cudnn": "xla"}.get(self.planned_attention, self.planned_attention)
        self.scope = Scope.of(config, self.folder, {}) if config.precomputed else None


def planned_job(config, platform: str) -> PlannedBasisJob:
    """The job as it would be on a "tpu" or "gpu". UserError for another one: its data alone know what a batch is."""
    if config.job != "basis":
        raise UserError(
            f"the config is of the job {config.job!r}; only a basis's training is planned: give "
            "configs/basis.py:kontext or one like it",
            2,
        )
    return PlannedBasisJob(config, platform)


def grid_size(config) -> tuple[int, int]:
    """(height, width) of the grids, pixels. UserError where they would differ from example to example."""
    side = config.data.quadrant_size
    if not side:
        raise UserError(
            "config.data.quadrant_size is 0, so that each grid has a size of its own; plan for one size: "
            "set --config.data.quadrant_size=256 or another multiple of 8",
            2,
        )
    height, width = (side, side) if isinstance(side, int) else side
    return 2 * height, 2 * width


def tokens(job: BasisJob) -> int:
    """Noisy tokens of a grid; there are as many of its condition."""
    height, width = grid_size(job.config)
    return height * width // (job.folder.backbone.latents.patch * job.folder.vae_config.downscale) ** 2


def batch_shapes(job: BasisJob, mesh: Mesh) -> Shapes:
    """What `job.prepare` makes of a batch, split over the mesh as `sharding.put_batch` does."""
    config, b = job.config, job.config.train.batch
    shapes = {"grids": ((b, 2, *grid_size(config), 3), np.uint8)}
    if job.scope:
        shapes |= prompt_shapes(job, b)
    else:
        shapes |= {"clip_ids": ((b, 77), np.int32), "t5_ids": ((b, job.folder.text_tokens), np.int32)}
    if job.basis_config.coefficients.from_images:
        if job.scope and not job.scope.queries_kept:
            shapes["query"] = ((b, query_width(job)), np.float32)
        else:
            processor = job.folder.encoder.processor
            views = queries.query_mode(job.basis_config.query_mode).view_count
            shapes["views"] = ((b, views, *(processor.crop or processor.size), 3), np.uint8)
    split = NamedSharding(mesh, P(sharding.BATCH))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in shapes.items()}


def prompt_shapes(job: BasisJob, b: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Text and pooled text of b captions."""
    flux, dtype = job.folder.flux_config, jnp.dtype(job.config.compute_dtype)
    return {
        "text": ((b, job.folder.text_tokens, flux.joint_attention_dim), dtype),
        "pooled": ((b, flux.pooled_projection_dim), dtype),
    }


def query_width(job: BasisJob) -> int:
    encoder = nnx.eval_shape(lambda: job.folder.encoder.make(nnx.Rngs(0)))
    return queries.query_dim(job.basis_config.query_mode, encoder)


def device_bytes(shapes) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)
    )
