"""The least time that a step can take on a chip: for its products, its memory's traffic, what it sends, and what it
reads of the host's memory."""

import dataclasses

from lorweb_jax.nn.offload import PINNED
from lorweb_jax.nn.sharding import batch_shares
from lorweb_jax.planning.chips import Chip
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.shapes import device_bytes, share_bytes
from lorweb_jax.planning.work import Work


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step (all steps, when sampling)."""

    compute: float
    memory: float
    interconnect: float
    host: float

    @property
    def bottleneck(self) -> str:
        return max(("compute", "memory", "interconnect", "host"), key=lambda name: getattr(self, name))


def roofline(program: Program, work: Work, sent: float, chip: Chip) -> Roofline:
    """`sent`: bytes that a device sends."""
    return Roofline(
        work.total / parts(program) / chip.flops,
        memory_bytes(program) / chip.bandwidth,
        sent / chip.interconnect,
        streamed_bytes(program) / chip.host,
    )


def parts(program: Program) -> int:
    """Between how many devices the work is divided; others do the same as these."""
    shares, mesh = batch_shares(program.mesh), program.mesh.shape
    return (shares if program.batch % shares == 0 else 1) * mesh["sequence"] * mesh["tensor"]


def memory_bytes(program: Program) -> float:
    """What a device must read and write at least: the blocks' weights, whole along fsdp, for each pass over them, and
    its other weights once; in training the trainables, their gradients and the optimizer's state in and out."""
    job, passes = program.job, program.steps
    if program.what == "train":
        passes = (2 if job.config.remat == "none" else 3) * job.passes * job.config.train.accumulate
    base, basis = program.groups["base"], program.groups["basis"]
    kernels = {f"transformer.{path}.kernel" for path in job.folder.backbone.scanned}
    whole = sum(base[path].size * base[path].dtype.itemsize for path in kernels) / program.mesh.shape["tensor"]
    once = device_bytes(
        [shape for path, shape in base.items() if path.startswith("transformer.") and path not in kernels]
    )
    return passes * whole + once + 2 * device_bytes((program.gradients, basis, program.groups.get("optimizer", ())))


def streamed_bytes(program: Program) -> float:
    """What a device reads of the host's memory: the blocks' kernels for each pass over them, in training forward and
    backward; modulations and text encoders forward alone, as nothing before them is trained."""
    job, forward, both = program.job, 1, program.steps
    if program.what == "train":
        forward = job.config.train.accumulate
        both = 2 * job.passes * forward
    scanned = {f"transformer.{path}.kernel" for path in job.folder.backbone.scanned}
    total = 0.0
    for path, shape in program.groups["base"].items():
        if shape.sharding.memory_kind != PINNED:
            continue
        if path in scanned:
            total += both * share_bytes(shape)
        elif path.startswith("transformer."):
            total += forward * share_bytes(shape) * (job.passes if program.what == "train" else 1)
        elif program.what == "train":
            total += forward * share_bytes(shape)
    return total
