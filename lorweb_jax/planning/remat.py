"""remat=auto: the fastest policy among those whose step fits into the devices' memory."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.layers import REMAT_POLICIES
from lorweb_jax.planning.activations import estimate, kept_by_example
from lorweb_jax.planning.chips import GIB, Chip
from lorweb_jax.planning.figures import arguments, scanned_program
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.shapes import device_bytes
from lorweb_jax.planning.topology import Target
from lorweb_jax.processes.compiler_flags import MEMORY_SHARE
from lorweb_jax.training.job import Job

SPARED = 0.1  # of the memory: estimates are off by a few hundredths of it


def this_machine() -> Target:
    """The devices that jax has here; of a CPU's the host's memory is shared between them. A device that doesn't say
    what memory it has is taken to have none."""
    device, rates = jax.local_devices()[0], [1.0] * 3  # which nobody asks for
    if device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(jax.local_devices())
    else:
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Target("this machine", device.platform, Chip(device.device_kind, limit, *rates), jax.devices(), False)


def planned(there: Target) -> Target:
    """Devices elsewhere with as much memory as a training process will have of them."""
    share = MEMORY_SHARE if there.platform == "gpu" else 1
    return dataclasses.replace(there, chip=dataclasses.replace(there.chip, memory=share * there.chip.memory))


def room(there: Target) -> float:
    """Bytes that an estimated peak may have."""
    return (1 - SPARED) * there.chip.memory


def peak(program: Program, kept: float) -> float:
    """Bytes on a device, estimated from shapes: arguments, gradients, activations; kept: see kept_by_example."""
    return sum(arguments(program).values()) + device_bytes(program.gradients) + estimate(program, kept).total


def candidates(config, there: Target) -> list[str]:
    """Those of REMAT_POLICIES that "auto" stands for, the fastest first. On accelerators what is elementwise is made
    anew in less time than it takes to keep (docs/performance.md), so that keeping all, "none", is for CPUs."""
    return list(REMAT_POLICIES)[config.offload == "blocks" or there.platform != "cpu" :]


def choose(config, there: Target) -> str:
    """What config.remat is: itself, or for "auto" the first of `candidates` that fits `there` with a tenth to spare,
    and the last where none does or the step can't be planned. All processes of a run get the same answer; process 0
    tells why."""
    if config.remat != "auto":
        return config.remat
    names, peaks = list(REMAT_POLICIES), {}
    chosen, why = names[-1], "nothing fits"
    try:
        for name in candidates(config, there):
            changed = config.copy_and_resolve_references()
            changed.remat = name
            program = scanned_program(changed, there, "train")
            peaks[name] = peak(program, kept_by_example(program, program.traced(there.gpu)))
            if peaks[name] <= room(there):
                chosen, why = name, "fits"
                break
        estimated = ", ".join(f"{name} {size / GIB:.1f}" for name, size in peaks.items())
        why += f"; GiB at the peak, estimated: {estimated}; there are {there.chip.memory / GIB:.1f}"
    except UserError as error:
        why = f"its memory can't be planned: {error}"
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        chosen = names[int(multihost_utils.broadcast_one_to_all(np.int32(names.index(chosen))))]
    print(f"remat: {chosen} ({why})", flush=True)
    return chosen


def settled(make_job: Callable[[Any], Job]) -> Callable[[Any], Job]:
    """`make_job`, after which config.remat, where there is one, is a policy that suits this machine."""

    def make(config) -> Job:
        job = make_job(config)
        if "remat" in config:
            config.remat = choose(config, this_machine())
        return job

    return make
