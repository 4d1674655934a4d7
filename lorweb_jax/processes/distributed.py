"""Several processes as one run, on one or many hosts: how they find each other, start together and end together.

jax.distributed connects them. jax detects Slurm, Cloud TPU, Open MPI and Kubernetes (this one with the package
kubernetes); environment variables override what it detects:

    JAX_COORDINATOR_ADDRESS      host:port of process 0; all other processes must reach that port
    JAX_NUM_PROCESSES            number of processes; 1 stands for a run of one process in any cluster
    JAX_PROCESS_ID               number of this process, from 0
    JAX_LOCAL_DEVICE_IDS         devices of this host that this process uses, such as 0,1; by default all of them, or
                                 one each where Slurm starts several processes on a host
    LORWEB_START_TIMEOUT         seconds in which all processes have to start, 300 by default
    LORWEB_HEARTBEAT_TIMEOUT     seconds without a heartbeat after which a process counts as gone, 60 by default

A run of one process opens no port. jax's coordination service, in process 0, does not authenticate: only the hosts of
the run should be able to reach its port.
"""

import contextlib
import dataclasses
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.processes.coordination import Coordination

EXPLICIT = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

others: Coordination | None = None  # while this process is one of several


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of a run this one is."""

    address: str  # host:port of process 0
    count: int
    index: int
    devices: tuple[int, ...] | None = None  # ids among those of this host; None: all, or JAX_LOCAL_DEVICE_IDS


def find_place() -> Place | None:
    """This process's place, from the environment and the cluster; None for a run of one process.

    UserError for contradictory variables, or if the cluster detection fails.
    """
    address, *numbers = [os.environ.get(name) or None for name in EXPLICIT]
    try:
        count, index = (None if number is None else int(number) for number in numbers)
    except ValueError:
        raise _contradiction() from None
    if count == 1:
        return None
    devices = None
    if None in (address, count, index):
        address, count, index, devices = _ask_cluster(address, count, index)
    missing = [name for name, value in zip(EXPLICIT, (address, count, index)) if value is None]
    if len(missing) == len(EXPLICIT) or (count == 1 and not any(numbers)):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be set too, since others of the three are: set all of "
            f"{', '.join(EXPLICIT)}, or none",
            2,
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or not 0 <= index < count:
        raise _contradiction()
    return Place(address, count, index, devices)


def _contradiction() -> UserError:
    shown = " ".join(f"{name}={os.environ[name]}" for name in EXPLICIT if name in os.environ)
    return UserError(
        f"{shown or 'what the cluster says'} makes no sense; give host:port, a number of processes, and one from 0 to "
        "that number − 1",
        2,
    )


def _ask_cluster(address: str | None, count: int | None, index: int | None) -> tuple:
    """The three, those that are None detected by jax, and the ids of this process's devices (None: all)."""
    # initialize() detects as well, but only while it starts the service, which a single process has no use for.
    from jax._src.clusters import ClusterEnv

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the package kubernetes is missing: see launch/jobset.yaml
            address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
                address, count, index, None, None, timeout("LORWEB_START_TIMEOUT")
            )
    except Exception as error:
        raise UserError(
            f"the cluster that this process runs in can't be asked about it ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}); set {', '.join(EXPLICIT)}, or JAX_NUM_PROCESSES=1 for one process"
        ) from None
    # jax gives every process of Slurm's one GPU; a process that is alone on its host takes all.
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES", "1")
    if devices is None or alone or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return address, count, index, None
    return address, count, index, tuple(devices)


def timeout(name: str) -> int:
    """Seconds of an environment variable, or its default. UserError unless it is a positive integer."""
    text = os.environ.get(name) or {"LORWEB_START_TIMEOUT": "300", "LORWEB_HEARTBEAT_TIMEOUT": "60"}[name]
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{name} is {text!r}; give a whole number of seconds, 1 or more", 2)
    return int(text)


@contextlib.contextmanager
def joined(options: Mapping[str, Any]) -> Iterator[None]:
    """Context in which all processes of the run are one jax program; it does nothing for a run of one process.

    options: {name: value} that must be equal in all processes (the config's fields, the run folder).

    Enter it before jax initialises its backends. Only process 0 prints. An exception in any process is shown by that
    process and ends all of them. The context exits once all processes have reached its end. UserError, with status 1
    or 2, if a process cannot join or if options differ.
    """
    global others
    place = find_place()
    if place is None:
        yield
        return
    patience, silence = timeout("LORWEB_START_TIMEOUT"), timeout("LORWEB_HEARTBEAT_TIMEOUT")
    if place.index == 0:
        _require_free(int(place.address.rpartition(":")[2]))
    with contextlib.ExitStack() as stack:
        others = Coordination(place.address, place.count, place.index, patience, silence)
        stack.enter_context(others.log.python_bypasses())
        try:
            _start_jax(place, patience, silence)
            others.meet(options)
            if place.index:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield
            others.finish()
        except BaseException as error:
            others.end(error)
    others = None


def _start_jax(place: Place, patience: int, silence: int) -> None:
    import jax

    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=patience,
        heartbeat_timeout_seconds=silence,
    )


def _require_free(port: int) -> None:
    """UserError if something listens at the port: jax would wait, or share the port with another run of jax."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError as error:
        raise UserError(
            f"port {port} of {socket.gethostname()} can't be used ({error.strerror}); end what uses it, or give "
            "another one in JAX_COORDINATOR_ADDRESS (JAX_COORDINATOR_PORT in a cluster)"
        ) from None
