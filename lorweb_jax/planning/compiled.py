"""Compiling a program for devices that aren't there, and what its compiler says of it."""

import dataclasses
import re
import time

import jax

from lorweb_jax.errors import UserError
from lorweb_jax.planning import collectives
from lorweb_jax.planning.program import Program

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes on a device: `arguments` as the device lays them out, `results` beyond those that take an argument's
    place, `temporaries` and `code`. Or, if the compiler found that memory doesn't suffice, `needed` of `capacity`.

    `seconds` by the clock, and of all this machine's cores together."""

    seconds: float
    core_seconds: float
    arguments: float = 0
    results: float = 0
    temporaries: float = 0
    code: float = 0
    needed: float = 0
    capacity: float = 0
    traffic: dict[str, collectives.Traffic] | None = None  # None where the program's text can't be had
    text: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return not self.needed


def compile_program(program: Program, traced: jax.stages.Traced, platform: str) -> Compiled:
    """UserError for a failure of the compiler other than too little memory."""
    clock, cores = time.perf_counter(), time.process_time()
    with jax.set_mesh(program.mesh):
        lowered = traced.lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile()
        except Exception as error:  # jax raises whatever the compiler does
            return _too_large(str(error), time.perf_counter() - clock, time.process_time() - cores)
    took = time.perf_counter() - clock, time.process_time() - cores
    memory, text = compiled.memory_analysis(), _text(compiled)
    return Compiled(*took, arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes,
                    results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
                    code=memory.generated_code_size_in_bytes,
                    traffic=collectives.traffic(text, program.mesh.size) if text else None, text=text)


def _text(compiled: jax.stages.Compiled) -> str:
    """The compiled program, or "" where the library can't write out what its own compiler made (seen of libtpu 0.0.52
    at full depth on v6e: an "async done" that it then takes for malformed)."""
    try:
        return compiled.as_text() or ""
    except jax.errors.JaxRuntimeError:
        return ""


def _too_large(message: str, seconds: float, core_seconds: float) -> Compiled:
    # "the total memory required for HLO temporaries (23.88G) exceeds available HBM (15.75G)": arguments are in it.
    found = re.search(r"total memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", message)
    if not found:
        raise UserError("the compiler failed: " + message.strip().splitlines()[0])
    needed, needed_unit, capacity, capacity_unit = found.groups()
    return Compiled(seconds, core_seconds, needed=float(needed) * _UNITS[needed_unit],
                    capacity=float(capacity) * _UNITS[capacity_unit])
