"""remat=auto: the policy that recomputes least among those whose step fits into the devices' memory."""

import dataclasses
import os

import jax
import numpy as np

from lorweb_jax.nn.layers import REMAT_POLICIES
from lorweb_jax.planning.activations import estimate
from lorweb_jax.planning.chips import GIB, Chip
from lorweb_jax.planning.figures import arguments, kept, make_program
from lorweb_jax.planning.shapes import device_bytes
from lorweb_jax.planning.topology import Target
from lorweb_jax.processes.compiler_flags import MEMORY_SHARE

SPARED = 0.1  # of the memory: estimates are off by a few hundredths of it


def this_machine() -> Target:
    """The devices that jax has here."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    if limit is None:
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(jax.local_devices())
    chip = Chip(device.device_kind, limit, *[1.0] * 3)  # no rates are asked for
    return Target("this machine", device.platform, chip, jax.devices(), False)


def planned(there: Target) -> Target:
    """Devices elsewhere with as much memory as a training process will have of them."""
    share = MEMORY_SHARE if there.platform == "gpu" else 1
    return dataclasses.replace(there, chip=dataclasses.replace(there.chip, memory=share * there.chip.memory))


def peak(config, there: Target, what: str, kept: float) -> float:
    """Bytes on a device, estimated from shapes: arguments, gradients, activations."""
    program = make_program(config, there, what)
    return sum(arguments(program).values()) + device_bytes(program.gradients) + estimate(program, kept).total


def choose(config, there: Target) -> str:
    """What config.remat is: itself, or for "auto" the first of REMAT_POLICIES that fits `there` with a tenth to spare,
    and where none does the last. All processes of a run get the same answer."""
    if config.remat != "auto":
        return config.remat
    room, peaks = (1 - SPARED) * there.chip.memory, {}
    for name in REMAT_POLICIES:
        if name == "none" and config.offload == "blocks":
            continue
        changed = config.copy_and_resolve_references()
        changed.remat = name
        peaks[name] = peak(changed, there, "train", kept(changed, there))
        if peaks[name] <= room:
            break
    names = list(REMAT_POLICIES)
    index = np.int32(names.index(name))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        index = multihost_utils.broadcast_one_to_all(index)
    chosen = names[int(index)]
    estimated = ", ".join(f"{name} {size / GIB:.1f}" for name, size in peaks.items())
    print(
        f"remat: {chosen} (GiB at the peak, estimated: {estimated}; there are {there.chip.memory / GIB:.1f})",
        flush=True,
    )
    return chosen
