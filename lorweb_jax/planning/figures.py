"""All the figures of one plan: bytes on a device, work, traffic, roofline."""

import dataclasses

import jax
import jax.extend

from lorweb_jax.nn import sharding
from lorweb_jax.planning import gpu_compiler, gpu_time, tpu_time
from lorweb_jax.planning.activations import estimate, kept_by_example
from lorweb_jax.planning.collectives import Traffic
from lorweb_jax.planning.compiled import Compiled, compile_program
from lorweb_jax.planning.estimated_time import Cost, costs
from lorweb_jax.planning.expected_traffic import expected_traffic
from lorweb_jax.planning.interconnect import ASSUMPTION as COMMUNICATION
from lorweb_jax.planning.program import PROGRAMS, Part, Program
from lorweb_jax.planning.roofline import Roofline, roofline
from lorweb_jax.planning.shapes import device_bytes, host_bytes, planned_job
from lorweb_jax.planning.topology import Target
from lorweb_jax.planning.work import Work, work


@dataclasses.dataclass(frozen=True)
class Plan:
    """`memory`: bytes on a device by what they are for, adding up to `peak`; `host_memory`: those of weights that are
    streamed to it; `compiled` is None where they are estimated from shapes; `costs` are its instructions' where their
    compiler tells, under `assumptions`."""

    target: Target
    program: Program
    memory: dict[str, float]
    host_memory: float
    peak: float
    capacity: float
    traffic: dict[str, Traffic]
    work: Work
    roofline: Roofline
    compiled: Compiled | None
    costs: list[Cost]
    assumptions: list[str]

    @property
    def fits(self) -> bool:
        return self.peak <= self.capacity and (self.compiled is None or self.compiled.fits)


def make_program(config, there: Target, what: str, as_run: bool = False) -> Program:
    """UserError for a mesh, a batch or a config that can't be; nothing has been compiled by then. as_run: with the
    attention that runs there, which can be traced only where its library is, or taken for granted (gpu_compiler.py)."""
    job = planned_job(config, there.platform)
    if as_run:
        job.attention = job.planned_attention
    return PROGRAMS[what](job, sharding.make_mesh(config.mesh, there.devices))


def scanned_program(config, there: Target, what: str) -> Program:
    """`make_program` with stacks, whatever config.unstacked: blocks of their own hold as many bytes, and what a step
    keeps (activations.py) is seen where blocks are scanned."""
    scanned = config.copy_and_resolve_references()
    scanned.unstacked = False
    return make_program(scanned, there, what)


def make_plan(config, there: Target, what: str) -> Plan:
    """By the devices' compiler where there is one; otherwise estimated."""
    program = make_program(config, there, what)
    traced = program.traced(there.gpu)
    compiled = None
    if there.compiles:
        # cuDNN's attention is one call, in which no products can be counted.
        as_run = make_program(config, there, what, as_run=True).traced(there.gpu) if there.gpu else traced
        compiled = compile_program(program, as_run, there)
    memory = arguments(program)
    gradients = device_bytes(program.gradients)
    if compiled and compiled.fits:
        padding = max(0, compiled.arguments - sum(map(used_bytes, program.parts, traced)))
        memory |= {
            "padding of arguments": padding,
            "gradients": gradients,
            "activations, temporaries": compiled.temporaries - gradients,
            "results, program": compiled.results + compiled.code,
        }
        peak, traffic = sum(memory.values()), compiled.traffic if compiled.text else expected_traffic(program)
    else:
        if config.unstacked:
            program_of_stacks = scanned_program(config, there, what)
            kept = kept_by_example(program_of_stacks, program_of_stacks.traced(there.gpu))
        else:
            kept = kept_by_example(program, traced)
        temporaries = estimate(program, kept).total
        memory |= {"gradients": gradients, "activations, temporaries": temporaries}
        peak, traffic = sum(memory.values()), expected_traffic(program)
        if compiled:
            memory["activations, temporaries"] += compiled.needed - peak
            peak = compiled.needed
    done = work(program, traced)
    sent = sum(kind.sent for kind in traffic.values())
    capacity = compiled.capacity if compiled and compiled.capacity else there.chip.memory
    how, spent = gpu_time if there.platform == "gpu" else tpu_time, []
    if compiled and timed(there):
        schedules = compiled.schedules
        spent = [cost for text in schedules for cost in costs(text, there.chip, program.mesh.size, how.model)]
    return Plan(
        there,
        program,
        {name: size for name, size in memory.items() if size},
        host_bytes(program.groups),
        peak,
        capacity,
        traffic,
        done,
        roofline(program, done, sent, there.chip),
        compiled,
        spent,
        [*how.assumptions(there.chip), *([COMMUNICATION] if compiled.traffic else [])] if spent else [],
    )


def timed(there: Target) -> bool:
    """Whether it is known how long instructions take there, once they are compiled."""
    return gpu_compiler.estimates(there.chip.name) if there.platform == "gpu" else there.chip.name in tpu_time.CLOCKS


def used_bytes(part: Part, traced: jax.stages.Traced) -> float:
    """Of a part's arguments those that its compiled program takes: jit drops what has no use, such as the decoder of
    the autoencoder, which lies on the devices all the same."""
    jaxpr = traced.jaxpr.jaxpr
    used = {
        variable for equation in jaxpr.eqns for variable in equation.invars if isinstance(variable, jax.extend.core.Var)
    }
    return device_bytes(
        [
            leaf
            for leaf, variable in zip(jax.tree.leaves(part.arguments), jaxpr.invars, strict=True)
            if variable in used and leaf.sharding
        ]
    )


def arguments(program: Program) -> dict[str, float]:
    """Bytes that a device holds of what the step is given, from shapes and shardings: exact."""
    return {name: device_bytes(tree) for name, tree in program.groups.items()}
