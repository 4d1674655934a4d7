"""What a compiled step sends between devices, read from its HLO text.

The body of a loop counts as often as it runs; of an asynchronous collective, a pair of instructions or a chain of
fusions that compute meanwhile, only the start counts. Bytes are those that one device sends with the ring algorithms,
n devices in a group and S bytes of the whole array in a group: all-gather, reduce-scatter, all-to-all S·(n−1)/n ·
all-reduce 2·S·(n−1)/n · collective-permute what it passes on.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable

from lorweb_jax.planning.hlo import Instruction, element, parse, size_of, trips

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|called_computations)=\{?%?([\w.-]+)")


@dataclasses.dataclass
class Traffic:
    """Of one kind of collective in a step: how often it runs, and the bytes that a device sends. `at_least`: some are
    in a loop of which the program doesn't say how often it runs; they are counted once."""

    count: float = 0
    sent: float = 0
    at_least: bool = False

    def add(self, count: float, sent: float, at_least: bool) -> None:
        self.count += count
        self.sent += sent
        self.at_least |= at_least


def traffic(text: str, devices: int) -> dict[str, Traffic]:
    """{kind: Traffic} of a compiled program's HLO text, over all its loops."""
    computations, entry = parse(text)
    total: dict[str, Traffic] = collections.defaultdict(Traffic)

    def visit(name: str, times: float, at_least: bool) -> None:
        instructions = computations.get(name, ())
        begins = any('"AsyncCollectiveStart"' in instruction.rest for instruction in instructions)
        for instruction in instructions:
            kind = kind_of(instruction)
            if kind and "async_collective_fusion_config" in instruction.rest and not begins:
                pass  # one that other fusions go on with while they compute
            elif kind:
                total[kind].add(times, times * sent(kind, instruction, devices), at_least)
            elif instruction.opcode == "while":
                runs = trips(instruction, computations)
                visit(instruction.attribute("body"), times * (runs or 1), at_least or runs is None)
            elif instruction.opcode == "conditional":
                for branch in re.findall(
                    r"%([\w.-]+)", (re.search(r"branch_computations=\{(.*?)\}", instruction.rest) or [""])[0]
                ):
                    visit(branch, times, at_least)
            elif instruction.opcode in ("async-update", "async-done"):
                pass  # name the computation that async-start began
            elif called := called_by(instruction):
                visit(called, times, at_least)

    visit(entry, 1.0, False)
    return {kind: total[kind] for kind in KINDS if kind in total}


def added(parts: Iterable[dict[str, Traffic]]) -> dict[str, Traffic]:
    """Of several programs together."""
    total: dict[str, Traffic] = collections.defaultdict(Traffic)
    for part in parts:
        for kind, traffic in part.items():
            total[kind].add(traffic.count, traffic.sent, traffic.at_least)
    return {kind: total[kind] for kind in KINDS if kind in total}


def called_by(instruction: Instruction) -> str | None:
    """The computation that it fuses, starts or calls."""
    match = _CALLED.search(instruction.rest)
    return match and match.group(1)


def kind_of(instruction: Instruction) -> str | None:
    """One of KINDS; None if it is no collective."""
    # The TPU compiler's fused reduce-scatter holds an all-reduce and a slice of it.
    if instruction.opcode == "fusion" and "all-reduce-scatter" in instruction.rest.split("calls=")[-1]:
        return "reduce-scatter"
    opcode = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    return opcode if opcode in KINDS else None


def sent(kind: str, instruction: Instruction, devices: int) -> float:
    """Bytes that one of `devices` sends for a collective of this kind, once."""
    started = instruction.opcode.endswith("-start")
    n = _group(instruction.rest, devices)
    result = instruction.shape
    if started and kind != "all-reduce":
        result = element(result, 1)  # (operand, result, …)
    size = size_of(result)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= n  # its result is a device's part
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _group(rest: str, devices: int) -> int:
    """Devices of a group, from any of the forms in which HLO writes groups; all of them where it says nothing."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(match.group(1).split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(match.group(2))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match.group(1)))
        # An axis, or a part 'name':(before)size of one.
        return math.prod(
            int(part or sizes[name]) for name, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match.group(2))
        )
    return devices
