"""Compiling a program for devices that aren't there, and what its compiler says of it."""

import dataclasses
import re
import tempfile
import time
from pathlib import Path

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
    traffic: dict[str, collectives.Traffic] = dataclasses.field(default_factory=dict)
    text: str = dataclasses.field(default="", repr=False)

    @property
    def fits(self) -> bool:
        return not self.needed


def compile_program(program: Program, traced: jax.stages.Traced, platform: str) -> Compiled:
    """UserError for a failure of the compiler other than too little memory."""
    with tempfile.TemporaryDirectory(prefix="lorweb_plan_") as dump, jax.set_mesh(program.mesh):
        clock, cores = time.perf_counter(), time.process_time()
        lowered = traced.lower(lowering_platforms=(platform,))
        try:
            # Dumped rather than asked of the result: libtpu 0.0.52 can't always read its own programs back (an "async
            # done" that it takes for malformed, at full depth on v6e).
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        except Exception as error:  # jax raises whatever the compiler does
            return _too_large(str(error), time.perf_counter() - clock, time.process_time() - cores)
        took = time.perf_counter() - clock, time.process_time() - cores
        text = "".join(path.read_text() for path in Path(dump).glob("*.after_optimizations.txt"))
    memory = compiled.memory_analysis()
    return Compiled(*took, arguments=memory.argument_size_in_bytes, temporaries=memory.temp_size_in_bytes,
                    results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
                    code=memory.generated_code_size_in_bytes, traffic=collectives.traffic(text, program.mesh.size),
                    text=text)


def _too_large(message: str, seconds: float, core_seconds: float) -> Compiled:
    # "the total memory required for HLO temporaries (23.88G) exceeds available HBM (15.75G)": arguments are in it.
    size = r"\(([\d.]+)([KMGT]?)\)"
    found = re.search(rf"total memory required[^(]*{size} exceeds available HBM {size}", message)
    if not found:
        raise UserError("the compiler failed: " + message.strip().splitlines()[0])
    needed, needed_unit, capacity, capacity_unit = found.groups()
    return Compiled(seconds, core_seconds, needed=float(needed) * _UNITS[needed_unit],
                    capacity=float(capacity) * _UNITS[capacity_unit])
