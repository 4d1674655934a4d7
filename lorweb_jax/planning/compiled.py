"""Compiling a program for devices that aren't there, and what its compiler says of it."""

import dataclasses
import functools
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lorweb_jax.common.errors import UserError
from lorweb_jax.planning import collectives, gpu_compiler
from lorweb_jax.planning.program import Program
from lorweb_jax.planning.topology import Target
from lorweb_jax.training.step import side_by_side

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes on a device: all parts' `arguments` as the device lays them out and `code`; of the part that needs most,
    `temporaries` and `results` beyond those that take an argument's place. Or, if the compiler found that memory
    doesn't suffice, `needed` of `capacity`.

    `seconds` by the clock, and of all this machine's cores together. `schedules`: the text of each part with what its
    compiler says of instructions' times, in the order in which they run."""

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
    schedules: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @property
    def fits(self) -> bool:
        return not self.needed


def compile_program(program: Program, traced: Sequence[jax.stages.Traced], there: Target) -> Compiled:
    """All parts, side by side. UserError for a failure of the compiler other than too little memory."""
    clock, cores = time.perf_counter(), time.process_time()
    with jax.set_mesh(program.mesh):
        lowered = [
            part.lower(lowering_platforms=({"gpu": "cuda"}.get(there.platform, there.platform),)) for part in traced
        ]
    compile = functools.partial(_compile, devices=program.mesh.size)
    if there.platform == "gpu":
        compile = functools.partial(_compile_gpu, devices=program.mesh.size, chip=there.chip.name)
    parts = side_by_side([functools.partial(compile, part) for part in lowered])
    took = time.perf_counter() - clock, time.process_time() - cores
    if failed := [part for part in parts if isinstance(part, str)]:
        return max((_too_large(message, *took) for message in failed), key=lambda complaint: complaint.needed)
    memory = [part.memory for part in parts]
    most = max(memory, key=lambda part: part.temp_size_in_bytes + _results(part))
    return Compiled(
        *took,
        arguments=sum(part.argument_size_in_bytes for part in memory),
        temporaries=most.temp_size_in_bytes,
        results=_results(most),
        code=sum(part.generated_code_size_in_bytes for part in memory),
        traffic=collectives.added(part.traffic for part in parts),
        text="\n".join(part.text for part in parts),
        schedules=tuple(part.schedule for part in parts),
    )


class _Part(NamedTuple):
    memory: Any
    traffic: dict[str, collectives.Traffic]
    text: str
    schedule: str


def _results(memory) -> int:
    return memory.output_size_in_bytes - memory.alias_size_in_bytes


def _compile(lowered: jax.stages.Lowered, devices: int) -> _Part | str:
    """The compiled program's figures, or the compiler's complaint."""
    with tempfile.TemporaryDirectory(prefix="lorweb_plan_") as dump:
        try:
            # Dumped rather than asked of the result: libtpu 0.0.52 can't always read its own programs back (an "async
            # done" that it takes for malformed, at full depth on v6e).
            compiled = lowered.compile(compiler_options={"xla_dump_to": dump, "xla_dump_hlo_as_text": True})
        except Exception as error:  # jax raises whatever the compiler does
            return str(error)
        text, schedule = (
            "".join(path.read_text() for path in Path(dump).glob(f"*.{stage}.txt"))
            for stage in ("after_optimizations", "after_codegen")
        )
    return _Part(compiled.memory_analysis(), collectives.traffic(text, devices), text, schedule)


def _compile_gpu(lowered: jax.stages.Lowered, devices: int, chip: str) -> _Part:
    """The same for a GPU, whose compiler doesn't mind too little memory."""
    try:
        compiled = gpu_compiler.compiled(lowered, chip, devices)
    except Exception as error:  # jax raises whatever the compiler does
        raise UserError("the compiler failed: " + str(error).strip().splitlines()[0]) from None
    text = "\n".join(module.to_string() for module in compiled.hlo_modules())
    return _Part(compiled.get_compiled_memory_stats(), collectives.traffic(text, devices), text, text)


def _too_large(message: str, seconds: float, core_seconds: float) -> Compiled:
    # "the total memory required for HLO temporaries (23.88G) exceeds available HBM (15.75G)": arguments are in it.
    size = r"\(([\d.]+)([KMGT]?)\)"
    match = re.search(rf"total memory required[^(]*{size} exceeds available HBM {size}", message)
    if not match:
        raise UserError("the compiler failed: " + message.strip().splitlines()[0])
    needed, needed_unit, capacity, capacity_unit = match.groups()
    return Compiled(
        seconds,
        core_seconds,
        needed=float(needed) * _UNITS[needed_unit],
        capacity=float(capacity) * _UNITS[capacity_unit],
    )
