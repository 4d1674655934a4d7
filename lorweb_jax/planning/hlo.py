"""The text of a compiled program, HLO, as instructions."""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
# %name = shape opcode(operands), attributes
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?\s*$")


@dataclasses.dataclass(frozen=True)
class Instruction:
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


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """({name: instructions} of its computations, the entry's name)."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif _END.match(line):
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            root, name, shape, opcode, rest = match.groups()
            current.append(Instruction(name, shape, opcode, rest, bool(root)))
        elif current:  # a Pallas call's metadata has line ends in it
            current[-1] = dataclasses.replace(current[-1], rest=f"{current[-1].rest} {line}")
    return computations, entry


def places(text: str) -> dict[str, str]:
    """{stack frame: "lorweb_jax/nn/attention.py:40"}, the line of the program that an instruction's stack_frame_id
    names; {} of a text without such tables."""

    def entries(name: str) -> dict[str, str]:
        table = re.search(rf"^{name}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
        return dict(line.split(" ", 1) for line in table.group(1).splitlines()) if table else {}

    def field(entry: str, name: str) -> str:
        return re.search(rf"\b{name}=(\d+)", entry).group(1)

    files, locations = entries("FileNames"), {}
    for number, entry in entries("FileLocations").items():
        file = re.sub(r".*/(site-packages/|(?=lorweb_jax/))", "", files[field(entry, "file_name_id")].strip('"'))
        locations[number] = f"{file}:{field(entry, 'line')}"
    return {number: locations[field(entry, "file_location_id")] for number, entry in entries("StackFrames").items()}


def inside(instruction: Instruction, computations: dict[str, list[Instruction]]) -> list[Instruction]:
    """What is fused in it, or what it starts."""
    return computations.get(instruction.attribute("calls") or "", [])


def size_of(shape: str) -> float:
    """Of a shape or a tuple of shapes; layouts in braces don't count."""
    total = 0.0
    for dtype, axes in _ARRAY.findall(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shape)):
        bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
        total += bits / 8 * math.prod(int(axis) for axis in axes.split(",") if axis)
    return total


def axes(shape: str) -> list[int]:
    """Of a shape, or of the first of a tuple of shapes."""
    match = _ARRAY.search(shape)
    return [int(axis) for axis in match.group(2).split(",") if axis] if match else []


def element(shape: str, place: int) -> str:
    """Of a tuple's shape, itself perhaps a tuple; the shape where it has no such element."""
    parts, depth, start = [], 0, 1
    if not shape.startswith("("):
        return shape
    for at, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(shape[start:at])
            start = at + 1
    return parts[place].strip() if len(parts) > place else shape


def operand_shapes(instruction: Instruction, others: dict[str, Instruction]) -> list[str]:
    """Of those that are known; others: the instructions beside it, by name."""
    shapes = []
    for name, *places in (operand.split("#") for operand in instruction.operands()):
        if name in others:
            shapes.append(functools.reduce(lambda shape, place: element(shape, int(place)), places, others[name].shape))
    return shapes


def trips(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
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


def _place(operand: str, instructions: dict[str, Instruction]) -> int | None:
    """Which part of a tuple an operand is: an instruction get-tuple-element of its own (jax 0.10), or named in place as
    %tuple#0 (jax 0.11 and later). None if it isn't one."""
    if "#" in operand:
        return int(operand.rpartition("#")[2])
    taken = instructions.get(operand)
    return int(taken.attribute("index")) if taken and taken.opcode == "get-tuple-element" else None


def _constant(instruction: Instruction | None) -> int | None:
    match = re.match(r"(\d+)\)", instruction.rest) if instruction and instruction.opcode == "constant" else None
    return int(match.group(1)) if match else None
