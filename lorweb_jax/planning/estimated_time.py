"""How long a compiled program would take, as its compiler estimates, by kinds of instructions and phases of the step.

What an instruction takes say gpu_time.py and tpu_time.py. Loops count as often as they run; what is sent between
devices is taken to be hidden as far as the schedule allows (interconnect.py).
"""

import dataclasses
import re
from collections.abc import Callable

from lorweb_jax.planning import collectives
from lorweb_jax.planning.chips import Chip
from lorweb_jax.planning.hlo import Instruction, element, inside, operand_shapes, parse, places, size_of, trips
from lorweb_jax.planning.interconnect import Interconnect, transfers

COLLECTIVES = "collectives, not hidden"
STREAMED = "from the host's memory"  # beside the others, as far as they leave time
KINDS = (
    *("products", "attention", "Pallas kernels", "elementwise, reductions", "copies, slices"),
    *(COLLECTIVES, STREAMED),
)
PHASES = ("forward", "recomputed", "backward")
_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
_MOVES = {
    *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "copy", "transpose", "reshape", "pad"),
    *("bitcast", "parameter", "constant"),
}
_IN_HOST_MEMORY = "S(5)"  # in a shape's layout

Instructions = dict[str, Instruction]  # of a computation, by name
Computations = dict[str, list[Instruction]]
# An instruction, beside others of its computation: its kind, and its seconds.
Model = Callable[[Instruction, Instructions, Computations, Chip], tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Cost:
    """`times` runs of an instruction, `seconds` all together; `source` is the operation of the program that it is part
    of, `place` its file and line, "" where the text doesn't say."""

    kind: str
    phase: str
    times: int
    seconds: float
    name: str
    source: str
    place: str


def costs(text: str, chip: Chip, devices: int, model: Model) -> list[Cost]:
    """Of each instruction of a scheduled HLO text that runs something, and of each wait for other devices."""
    (computations, entry), lines = parse(text), places(text)
    rows: list[Cost] = []

    def run(name: str, times: int, loop: str) -> float:
        """Adds a computation's rows; returns for how many seconds of one run the interconnect has nothing to send."""
        link = Interconnect()
        by_name = {instruction.name: instruction for instruction in computations.get(name, ())}
        for instruction in by_name.values():
            source = (re.search(r'op_name="([^"]*)"', instruction.rest) or ["", loop])[1]
            if instruction.opcode == "while":
                runs = trips(instruction, computations) or 1
                link.serve(runs * run(instruction.attribute("body"), times * runs, source))
            elif instruction.opcode == "call":
                link.serve(run(instruction.attribute("to_apply"), times, source))
            elif instruction.opcode == "conditional":
                pass  # which of its branches runs isn't known; ours have none that matter
            elif instruction.opcode not in _NOTHING:
                spent = _spent(instruction, by_name, computations, chip, model)
                begun, awaited = transfers(instruction, by_name, computations, devices)
                for key, size in begun.items():
                    link.begin(key, size / chip.interconnect)
                link.serve(sum(seconds for kind, seconds in spent.items() if kind != STREAMED))
                if waited := sum(map(link.wait, awaited)):
                    spent[COLLECTIVES] = waited
                place = lines.get(instruction.attribute("stack_frame_id") or "", "")
                for kind, seconds in spent.items():
                    rows.append(Cost(kind, _phase(source), times, times * seconds, instruction.name, source, place))
        return link.idle

    run(entry, 1, "")
    return rows


def _spent(
    instruction: Instruction, others: Instructions, computations: Computations, chip: Chip, model: Model
) -> dict[str, float]:
    """{kind: seconds} of what it does itself, once."""
    if instruction.opcode.endswith(("-done", "-update")) or collectives.kind_of(instruction):
        return {}
    if any(_IN_HOST_MEMORY in shape for shape in operand_shapes(instruction, others)):
        started = instruction.opcode.endswith("-start")  # (operands, result, …)
        return {STREAMED: size_of(element(instruction.shape, 1) if started else instruction.shape) / chip.host}
    kind, seconds = model(instruction, others, computations, chip)
    return {kind: seconds} if seconds else {}


def _phase(source: str) -> str:
    if "rematted" in source:
        return "recomputed"
    return "backward" if "transpose(" in source else "forward"


def table(rows: list[Cost]) -> dict[str, dict[str, float]]:
    """{kind: {phase: seconds}}"""
    total = {kind: dict.fromkeys(PHASES, 0.0) for kind in KINDS}
    for row in rows:
        total[row.kind][row.phase] += row.seconds
    return total


def kind_by_opcodes(instruction: Instruction, computations: Computations) -> str:
    """Of what isn't a call of something foreign to XLA."""
    opcodes: set[str] = {each.opcode for each in inside(instruction, computations)}
    opcodes = opcodes or {instruction.opcode.removesuffix("-start")}
    if {"dot", "convolution"} & opcodes:
        return "products"
    # What XLA makes a plain copy of has nothing else inside; places in a stack are computed beside it.
    return "copies, slices" if opcodes <= _MOVES else "elementwise, reductions"


def moved(instruction: Instruction, others: Instructions) -> float:
    """Bytes of its operands and results."""
    return sum(map(size_of, [*operand_shapes(instruction, others), instruction.shape]))
