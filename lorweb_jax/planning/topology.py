"""The devices that a plan is made for: a TPU slice that libtpu describes, or GPUs of which only sizes are known."""

import dataclasses
import os
import re
from collections.abc import Sequence

import jax

from lorweb_jax.common.errors import UserError
from lorweb_jax.planning import gpu_compiler
from lorweb_jax.planning.chips import GPUS, TPUS, Chip

EXAMPLES = "v5e:4x4, v5p:2x2x2, v6e:2x4, v6e:4x4, tpu7x:2x2x1, gpu:h100 or gpu:h100x8"

HOST = 8  # GPUs in a host: between hosts nothing is known


@dataclasses.dataclass(frozen=True)
class Target:
    """`devices` to make a mesh of; `chip` is what each has. `compiles`: whether there is a compiler for them. gpu: what
    that compiles for where a CPU device stands in for it, which has the memory kinds that a described GPU lacks."""

    name: str
    platform: str
    chip: Chip
    devices: Sequence[jax.Device]
    compiles: bool
    gpu: jax.Device | None = None


def target(name: str) -> Target:
    """ "v6e:4x4" or "gpu:h100x8" -> its devices. UserError, with examples, for a name that nobody knows."""
    generation, _, shape = name.lower().partition(":")
    if generation == "gpu":
        return _gpus(name, shape)
    if generation not in TPUS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"the topology {name!r} is not known; give a TPU's generation ({', '.join(TPUS)}) and chips "
            f"along each axis, or gpu: with one of {', '.join(GPUS)}: {EXAMPLES}",
            2,
        )
    return _slice(name.lower(), TPUS[generation])


def _slice(name: str, chip: Chip) -> Target:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise UserError(
            "compiling for TPUs needs libtpu, which is not installed; pip install libtpu==0.0.52, which "
            "works without a TPU, or give a topology such as gpu:h100x8"
        ) from None
    # libtpu is wanted as a compiler alone: it must neither look for the TPUs of this machine nor claim them.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_ACCELERATOR_TYPE", "v6e-1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_WORKER_ID", "0"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chip_config_name=chip.variant
        ).devices
    except Exception as error:  # jax raises whatever libtpu does
        reason = str(error).strip().splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(
            f"the TPU compiler knows no topology {name!r} ({reason}); give one like {EXAMPLES}", 2
        ) from None
    return Target(name, "tpu", chip.share(1 + max(device.core_on_chip for device in devices)), devices, True)


def _gpus(name: str, shape: str) -> Target:
    """CPU devices that stand in for GPUs: they give a mesh its size. Those of one host may be known to a compiler."""
    kind, count = (shape, None) if shape in GPUS else re.fullmatch(r"(.*?)(?:x(\d+))?", shape).groups()
    if kind not in GPUS:
        raise UserError(
            f"the GPU {(kind or shape)!r} of topology {name!r} is not known; give one of {', '.join(GPUS)}, and how "
            "many, as in gpu:h100x8",
            2,
        )
    if (count := int(count or 1)) < 1:
        raise UserError(f"topology {name!r} has no GPU; give how many there are, as in gpu:h100x8", 2)
    known = count <= HOST and gpu_compiler.described(kind) and gpu_compiler.installed()
    gpu = gpu_compiler.devices(kind, count)[0] if known else None
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has made its devices already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"{count} GPUs were asked for, but jax has already made {len(devices)} CPU devices to stand in "
            "for them; plan in a fresh process"
        )
    return Target(name.lower(), "gpu", GPUS[kind], devices[:count], gpu is not None, gpu)
