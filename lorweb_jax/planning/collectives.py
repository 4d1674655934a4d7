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

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
# %name = shape opcode(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    def operands(self) -> list[str]:
        """Names; a part of a tuple that is named in place, as name#place."""
        return re.findall(r"%([\w.-]+(?:#\d+)*)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> str | None:
        match = re.search(rf"\b{name}=%?([\w.-]+)", self.rest)
        return match and match.group(1)


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
    computations, entry = _parse(text)
    total: dict[str, Traffic] = collections.defaultdict(Traffic)

    def visit(name: str, times: float, at_least: bool) -> None:
        instructions = computations.get(name, ())
        begins = any('"AsyncCollectiveStart"' in instruction.rest for instruction in instructions)
        for instruction in instructions:
            kind = _kind(instruction)
            if kind and "async_collective_fusion_config" in instruction.rest and not begins:
                pass  # one that other fusions go on with while they compute
            elif kind:
                total[kind].add(times, times * _sent(kind, instruction, devices), at_least)
            elif instruction.opcode == "while":
                trips = _trips(instruction, computations)
                visit(instruction.attribute("body"), times * (trips or 1), at_least or trips is None)
            elif instruction.opcode == "conditional":
                for branch in re.findall(
                    r"%([\w.-]+)", (re.search(r"branch_computations=\{(.*?)\}", instruction.rest) or [""])[0]
                ):
                    visit(branch, times, at_least)
            elif instruction.opcode in ("async-update", "async-done"):
                pass  # name the computation that async-start began
            elif called := _CALLED.search(instruction.rest):
                visit(called.group(1), times, at_least)

    visit(entry, 1.0, False)
    return {kind: total[kind] for kind in KINDS if kind in total}


def added(parts: Iterable[dict[str, Traffic]]) -> dict[str, Traffic]:
    """Of several programs together."""
    total: dict[str, Traffic] = collections.defaultdict(Traffic)
    for part in parts:
        for kind, traffic in part.items():
            total[kind].add(traffic.count, traffic.sent, traffic.at_least)
    return {kind: total[kind] for kind in KINDS if kind in total}


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = match.groups()
            current.append(_Instruction(name, shape, opcode, rest, bool(root)))
    return computations, entry


def _kind(instruction: _Instruction) -> str | None:
    # The TPU compiler's fused reduce-scatter holds an all-reduce and a slice of it.
    if instruction.opcode == "fusion" and "all-reduce-scatter" in instruction.rest.split("calls=")[-1]:
        return "reduce-scatter"
    opcode = instruction.opcode.removesuffix("-start").removeprefix("ragged-")
    return opcode if opcode in KINDS else None


def _sent(kind: str, instruction: _Instruction, devices: int) -> float:
    started = instruction.opcode.endswith("-start")
    n = _group(instruction.rest, devices)
    result = instruction.shape
    if started and kind in ("all-gather", "collective-permute"):
        result = _second(result)  # (operand, result, …)
    size = _bytes(result)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= n  # its result is a device's part
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _second(shape: str) -> str:
    """The second part of a tuple's shape, itself perhaps a tuple."""
    parts, depth, start = [], 0, 1
    for at, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[start:at])
            start = at + 1
    return parts[1] if len(parts) > 1 else shape


def _bytes(shape: str) -> float:
    """Of a shape or a tuple of shapes; layouts in braces don't count."""
    total = 0.0
    for dtype, axes in _ARRAY.findall(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
        total += bits / 8 * math.prod(int(axis) for axis in axes.split(",") if axis)
    return total


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


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]]) -> int | None:
    """How often a loop runs: what the compiler says, or counted from 0 by its step to its bound; None if neither."""
    if match := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(match.group(1))
    condition = {instruction.name: instruction for instruction in computations.get(loop.attribute("condition"), ())}
    body = {instruction.name: instruction for instruction in computations.get(loop.attribute("body"), ())}
    root = next((instruction for instruction in condition.values() if instruction.root), None)
    if root is None or root.opcode != "compare" or root.attribute("direction") != "LT":
        return None
    counter, bound = root.operands()[:2]
    limit, place = _constant(condition.get(bound)), _place(counter, condition)
    if limit is None or place is None:
        return None
    step, result = 1, next((instruction for instruction in body.values() if instruction.root), None)
    if result is not None and result.opcode == "tuple":
        following = body.get(result.operands()[place])
        if following is not None and following.opcode == "add":
            step = next((value for name in following.operands() if (value := _constant(body.get(name)))), 1)
    return -(-limit // step)


def _place(operand: str, instructions: dict[str, _Instruction]) -> int | None:
    """Which part of a tuple an operand is: an instruction get-tuple-element of its own (jax 0.10), or named in place as
    %tuple#0 (jax 0.11 and later). None if it isn't one."""
    if "#" in operand:
        return int(operand.rpartition("#")[2])
    taken = instructions.get(operand)
    return int(taken.attribute("index")) if taken and taken.opcode == "get-tuple-element" else None


def _constant(instruction: _Instruction | None) -> int | None:
    match = re.match(r"(\d+)\)", instruction.rest) if instruction and instruction.opcode == "constant" else None
    return int(match.group(1)) if match else None
