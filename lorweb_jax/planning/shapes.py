"""Training jobs as plans see them: model and batch as shapes, and what a step of each does.

No weights, no data, no files but configs. Letters: b batch, v views, t text tokens, j their width, p pooled width,
q query width.
"""

import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorweb_jax.adapters.basis import BasisConfig
from lorweb_jax.adapters.members import Members
from lorweb_jax.common.errors import UserError
from lorweb_jax.data.buckets import quadrant_shapes
from lorweb_jax.data.pair import MULTIPLE
from lorweb_jax.jobs.basis import BasisJob
from lorweb_jax.jobs.pair import PairJob
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.nn import sharding
from lorweb_jax.nn.attention import resolve
from lorweb_jax.nn.offload import PINNED
from lorweb_jax.pipeline import pair_run
from lorweb_jax.pipeline.published import open_pipeline
from lorweb_jax.planning.flops import basis_flops
from lorweb_jax.precomputed.scope import Scope
from lorweb_jax.training.state import Shapes

ShapesAndTypes = dict[str, tuple[tuple[int, ...], Any]]


class Planned:
    """What a plan asks of a job beside the job's own `build`, `encode` and `loss`; a class that mixes it in opens no
    data.

    named: what is trained, in words. passes: forward and backward, of each example in a step. size: (height, width) of
    the images that are drawn, pixels. references: reference images of an example, each as large.
    """

    named: str
    passes: int
    size: tuple[int, int]
    references: int

    def open(self, config, platform: str, encoder: str = "") -> None:
        self.config, self.folder = config, open_pipeline(config.pipeline, encoder)
        # For the devices that are planned for, not for those of this machine.
        self.planned_attention = resolve(
            config.attention, platform, jnp.dtype(config.compute_dtype), self.folder.flux_config.attention_head_dim
        )
        # cuDNN's can't even be traced where it isn't.
        self.attention = {"cudnn": "xla"}.get(self.planned_attention, self.planned_attention)

    @property
    def drawn(self) -> int:
        """Noisy tokens of an example."""
        height, width = self.size
        return height * width // (self.folder.backbone.latents.patch * self.folder.vae_config.downscale) ** 2

    @property
    def sequence(self) -> int:
        """Image tokens of an example, those of its references among them."""
        return self.drawn * (1 + self.references)

    @property
    def sequences(self) -> list[int]:
        return [self.sequence, self.sequence + self.folder.text_tokens]

    @property
    def micro_batch(self) -> int:
        """Examples that are computed at once."""
        return self.config.train.batch // self.config.train.accumulate

    def batch(self) -> ShapesAndTypes:
        """What `prepare` makes of a batch."""
        raise NotImplementedError

    def adapter_flops(self, kind: str, batch: int) -> float:
        """What is low-rank beside the weights adds to `base_flops` of a pass, "basis" or "forward"."""
        raise NotImplementedError

    def can_fold(self, b: int) -> bool:
        """Whether b images are drawn by a mix that is folded into the weights."""
        return False

    def sampling(self, b: int) -> tuple[tuple[int, ...], Any] | None:
        """Shape and dtype of what decides the coefficients of b images."""
        return None

    def sampling_adapters(self, model, decides: jax.Array | None, b: int) -> Any:
        """What is beside the weights while b images are drawn."""
        raise NotImplementedError

    def prompt_shapes(self, b: int) -> ShapesAndTypes:
        """Text and pooled text of b captions."""
        flux, dtype = self.folder.flux_config, jnp.dtype(self.config.compute_dtype)
        return {
            "text": ((b, self.folder.text_tokens, flux.joint_attention_dim), dtype),
            "pooled": ((b, flux.pooled_projection_dim), dtype),
        }


class PlannedBasisJob(Planned, BasisJob):
    """The basis's job."""

    named, passes, references = "basis", 1, 1

    def __init__(self, config, platform: str):
        self.open(config, platform, config.basis.encoder)
        self.basis_config = self.signed_config = BasisConfig(**config.basis)  # there may be no weights to sign with
        self.scope = Scope.of(config, self.folder, {}) if config.precomputed else None

    @property
    def size(self) -> tuple[int, int]:
        """Of the largest grids. UserError where each would have a size of its own."""
        shapes = quadrant_shapes(self.config.data)
        if not shapes:
            raise UserError(
                "config.data.quadrant_size is 0, so that each grid has a size of its own; plan for one size: "
                "set --config.data.quadrant_size=256 or another multiple of 8",
                2,
            )
        height, width = max(shapes, key=math.prod)
        return 2 * height, 2 * width

    def batch(self) -> ShapesAndTypes:
        b, shapes = self.config.train.batch, {}
        shapes["grids"] = (b, 2, *self.size, 3), np.uint8
        if self.scope:
            shapes |= self.prompt_shapes(b)
        else:
            shapes |= {"clip_ids": ((b, 77), np.int32), "t5_ids": ((b, self.folder.text_tokens), np.int32)}
        if self.basis_config.coefficients.from_images:
            if self.scope and not self.scope.queries_kept:
                shapes["query"] = ((b, self._query_width), np.float32)
            else:
                processor = self.folder.encoder.processor
                views = queries.query_mode(self.basis_config.query_mode).view_count
                shapes["views"] = ((b, views, *(processor.crop or processor.size), 3), np.uint8)
        return shapes

    @property
    def _query_width(self) -> int:
        encoder = nnx.eval_shape(lambda: self.folder.encoder.make(nnx.Rngs(0)))
        return queries.query_dim(self.basis_config.query_mode, encoder)

    def adapter_flops(self, kind: str, batch: int) -> float:
        basis = self.basis_config
        routed = basis.coefficients.from_images
        # The router's products, for one vector an example: none where coefficients are fixed, and left out where
        # each layer asks its own input, which is less than a thousandth.
        sizes = SimpleNamespace(
            size=basis.size,
            rank=basis.rank,
            key_dim=basis.key_dim if routed else 0,
            query_dim=self._query_width if routed else 0,
        )
        return basis_flops(kind, self.folder.backbone, sizes, batch, self.sequence, self.folder.text_tokens)

    def can_fold(self, b: int) -> bool:
        plain = self.config.quantization == self.config.offload == "none"
        return b == 1 and self.basis_config.coefficients.in_advance and plain

    def sampling(self, b: int) -> tuple[tuple[int, ...], Any] | None:
        return ((b, self._query_width), jnp.float32) if self.basis_config.coefficients.from_images else None

    def sampling_adapters(self, model, decides, b: int):
        return model.adapters(decides, b)


class PlannedPairJob(Planned, PairJob):
    """The pair's job, for square images of the config's long edge, the largest that augmentation makes."""

    named = "adapters"

    def __init__(self, config, platform: str):
        self.open(config, platform)
        self.joint, self.references = config.pair.joint, int(bool(config.data.condition))
        self.members: Members = nnx.eval_shape(lambda: pair_run.make_members(config.pair, self.folder.backbone.adapted))
        self.passes = len(self.members.names)
        side = config.data.long_edge // MULTIPLE * MULTIPLE
        self.size = side, side

    def batch(self) -> ShapesAndTypes:
        return {"images": ((self.config.train.batch, 2 + self.references, *self.size, 3), np.float32)}

    def adapter_flops(self, kind: str, batch: int) -> float:
        # Of both members together, in each pass; a pass's gradients are those of one member, whose A may be frozen.
        width, total = self.members.rank * len(self.members.names), 0.0
        for layers in self.members.groups.values():
            for layer in layers:
                products = width * (layer.inputs + layer.outputs)
                if kind == "basis":
                    products += width * (layer.inputs + layer.outputs) + self.members.rank * layer.outputs
                total += layer.depth * layer.rows(self.sequence, self.folder.text_tokens) * products
        return 2 * batch * total

    def sampling(self, b: int) -> tuple[tuple[int, ...], Any]:
        return (b, len(self.members.names)), jnp.float32

    def sampling_adapters(self, model, decides, b: int):
        return model.basis.adapters(decides)


JOBS = {"basis": PlannedBasisJob, "pair": PlannedPairJob}


def planned_job(config, platform: str) -> PlannedBasisJob | PlannedPairJob:
    """The job as it would be on a "tpu" or "gpu". UserError for another one: its data alone know what a batch is."""
    if config.job not in JOBS:
        raise UserError(
            f"the config is of the job {config.job!r}; only training beside a frozen FLUX is planned: give "
            "configs/basis.py:kontext, configs/pair.py:kontext or one like these",
            2,
        )
    return JOBS[config.job](config, platform)


def batch_shapes(job: Planned, mesh: Mesh) -> Shapes:
    """What `job.prepare` makes of a batch, split over the mesh as `sharding.put_batch` does."""
    split = NamedSharding(mesh, P(sharding.BATCH))
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=split) for name, (shape, dtype) in job.batch().items()}


def device_bytes(shapes) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sum(share_bytes(leaf) for leaf in jax.tree.leaves(shapes) if leaf.sharding.memory_kind != PINNED)


def host_bytes(shapes) -> int:
    """Bytes of a tree of shapes that lie in the host's memory for one device."""
    return sum(share_bytes(leaf) for leaf in jax.tree.leaves(shapes) if leaf.sharding.memory_kind == PINNED)


def share_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes of a device's share, wherever it lies."""
    return math.prod(shape.sharding.shard_shape(shape.shape)) * shape.dtype.itemsize
