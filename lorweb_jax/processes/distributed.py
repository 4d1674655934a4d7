"""Several processes as one run: who and where they are, how they start together and how they end.

`joined` finds out from the environment whether this process is one of many, in this order:

    JAX_COORDINATOR_ADDRESS=host:port of process 0, JAX_NUM_PROCESSES, JAX_PROCESS_ID   said explicitly
    Slurm                          a step of several tasks (srun); one process a node takes all its devices
    Cloud TPU and GKE              a slice of several hosts, one process each; several slices by MEGASCALE_…

Process 0's port must be reachable by all, and so must the one after it (watch.py). A process without any of these is
a run of its own.
"""

import contextlib
import ctypes
import dataclasses
import glob
import os
import re
import signal
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping

from lorweb_jax.common.errors import UserError, told
from lorweb_jax.processes.watch import Peers

TPU_PORT = 8476
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"

peers: Peers | None = None  # the run's processes, while this is one of several


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run: host and port of process 0, number of processes, this one's number and its devices."""

    host: str
    port: int
    count: int
    index: int
    devices: list[int] | None = None  # of this host; None takes all


def find_place(environment: Mapping[str, str]) -> Place | None:
    """This process's place, or None for a run of one process. UserError for a contradictory environment."""
    return _explicit(environment) or _slurm(environment) or _tpu(environment)


def _explicit(environment: Mapping[str, str]) -> Place | None:
    names = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
    given = [environment.get(name) for name in names]
    if not any(given):
        return None
    if not all(given):
        missing = [name for name, value in zip(names, given) if not value]
        raise UserError(
            f"{' and '.join(missing)} must be set too, since others of the three are: set all of "
            f"{', '.join(names)}, or none",
            2,
        )
    host, _, port = given[0].rpartition(":")
    try:
        place = Place(host.strip("[]"), int(port), int(given[1]), int(given[2]))
    except ValueError:
        place = None
    if not place or not host or not 0 <= place.index < place.count or not 0 < place.port < 65535:
        shown = " ".join(f"{name}={value}" for name, value in zip(names, given))
        raise UserError(
            f"{shown} make no sense; give host:port, a number of processes, and one from 0 to that number − 1", 2
        )
    return place


def _slurm(environment: Mapping[str, str]) -> Place | None:
    count = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if count == 1 or not nodes or "SLURM_PROCID" not in environment:
        return None
    # node7 · node7,node9 · node[007-011,013],other: the first node.
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    devices = None
    if count > int(environment.get("SLURM_STEP_NUM_NODES", 1)) and "," in environment.get("CUDA_VISIBLE_DEVICES", ","):
        devices = [int(environment["SLURM_LOCALID"])]
    return Place(
        first[1] + (first[2] or ""),
        61440 + 2 * (int(environment["SLURM_JOB_ID"]) % 2000),
        count,
        int(environment["SLURM_PROCID"]),
        devices,
    )


def _tpu(environment: Mapping[str, str]) -> Place | None:
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or not (
        glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    ):
        return None
    hosts, index = environment.get("TPU_WORKER_HOSTNAMES"), environment.get("TPU_WORKER_ID")
    if hosts is None or index is None:
        if environment.get("TPU_SKIP_MDS_QUERY"):
            return None
        hosts, index = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if hosts is None or index is None:
        return None
    names = [entry.split(":")[-1] for entry in hosts.split(",")]  # host, or name:number:address
    slices, number = (
        int(environment.get(f"MEGASCALE_{name}") or default) for name, default in (("NUM_SLICES", 1), ("SLICE_ID", 0))
    )
    if slices * len(names) == 1:
        return None
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", names[0]).split(":")[0]
    return Place(first, TPU_PORT, slices * len(names), number * len(names) + int(index))


def _metadata(name: str) -> str | None:
    """What Google Cloud says about this machine; None elsewhere."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within it, all processes of the run are one jax program; nothing happens where there is one process only.

    Call it before jax looks for devices. Only process 0 prints; errors are shown by the process that has them, and
    end all. Leaving it waits for the others.
    """
    global peers
    place = find_place(os.environ)
    if place is None or place.count == 1:
        yield
        return
    peers = Peers((place.host, place.port + 1), place.index, place.count)
    try:
        _start_jax(place)
        with contextlib.ExitStack() as quiet:
            if place.index:
                quiet.enter_context(contextlib.redirect_stdout(quiet.enter_context(open(os.devnull, "w"))))
            yield
        peers.finish()
        import jax

        jax.distributed.shutdown()
    except BaseException as error:
        if not told(error):
            peers.end_for(3.0)  # a collective that failed since another process is gone
            traceback.print_exc()
        message, status = told(error) or (f"error: {type(error).__name__}, shown by that process", 1)
        print(message, file=sys.stderr, flush=True)
        peers.end(message.removeprefix("error: "), status)


def _start_jax(place: Place) -> None:
    import jax

    # jax aborts as soon as its coordinator, in process 0, is gone. Let the watch come first, with its sentence and
    # status 1: a C function as the handler, sleep(SIGABRT = 6 s), holds only the thread that aborts.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; see processes/stop.py
    jax.distributed.initialize(
        f"{place.host}:{place.port}",
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
    )
