"""What a step keeps on a device beside its arguments, estimated from the traced program where no compiler is at hand.

Kept for the backward pass is what the scans over blocks put out block by block; that is counted exactly. On top comes
one block's work, forward and backward, which is a number of vectors as wide as the model for each token.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.extend
import jax.numpy as jnp

from lorweb_jax.nn.sharding import batch_shares
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.shapes import host_bytes
from lorweb_jax.planning.work import carried

# Vectors of width d a token, in the compute dtype; fitted to the TPU compiler's temporaries, as the next.
BLOCK_VECTORS = 24
# Of the autoencoder's widest layers, float32, held at once.
IMAGE_MAPS = 4


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on a device."""

    kept: float
    block: float
    gathered: float
    images: float

    @property
    def total(self) -> float:
        # Images are encoded before the first block runs.
        return max(self.kept + self.block + self.gathered, self.images)


def estimate(program: Program, kept: float) -> Estimate:
    """kept: see `kept_by_example`."""
    job, mesh = program.job, program.mesh
    backbone, vae = job.folder.backbone, job.folder.vae_config
    local = -(-(job.micro_batch if program.gradients else program.batch) // batch_shares(mesh))
    sequence = (job.sequence + job.folder.text_tokens) / mesh.shape["sequence"]
    itemsize, tensor = jnp.dtype(job.config.compute_dtype).itemsize, mesh.shape["tensor"]
    block = BLOCK_VECTORS * (1 if program.gradients else 0.5) * local * sequence * backbone.features * itemsize / tensor
    # At the last block going forward, or the first going backward, most is kept.
    last, _ = [stack for stack in backbone.stacks if stack[1]][-1]
    weights = sum(layer.inputs * layer.outputs for layer in backbone.scanned.values() if layer.stack == last)
    gathered = weights * itemsize / tensor if mesh.shape["fsdp"] > 1 else 0
    gathered += _largest_block(program)
    pixels = local * math.prod(job.size)  # of one of an example's images; the others follow
    images = IMAGE_MAPS * pixels * vae.block_out_channels[0] * 4 if program.gradients else 0
    return Estimate(kept * local / mesh.shape["sequence"], block, gathered, images)


def _largest_block(program: Program) -> float:
    """Of a block's kernels that are streamed from the host's memory, of the kind with the most."""
    backbone, base = program.job.folder.backbone, program.groups["base"]
    kernels = {path: base[f"transformer.{path}.kernel"] for path in backbone.scanned}
    return max(
        host_bytes([kernel for path, kernel in kernels.items() if backbone.scanned[path].stack == stack]) / depth
        for stack, depth in backbone.stacks
        if depth
    )


def kept_by_example(program: Program, traced: Sequence[jax.stages.Traced]) -> float:
    """Bytes that are kept for the backward pass, for each example of a micro-batch; of one pass, as what another keeps
    is gone by then."""
    job = program.job
    if not program.gradients:
        return 0
    kept = kept_bytes(traced[-1].jaxpr.jaxpr, job.sequence + job.folder.text_tokens)
    return kept / job.micro_batch / job.passes


def kept_bytes(jaxpr, sequence: int) -> float:
    """Bytes that scans put out for the backward pass, over the whole batch; attention's s² scores are left out where
    the traced implementation holds them."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and not equation.params["reverse"]:
            for out in equation.outvars[carried(equation) :]:
                if out.aval.shape.count(sequence) < 2:
                    total += out.aval.size * out.aval.dtype.itemsize
        # Within a scan, such as that over micro-batches, another's outputs are there once.
        total += sum(kept_bytes(inner, sequence) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total
