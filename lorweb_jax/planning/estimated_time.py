"""How long a compiled GPU program would take, by the cost model of its compiler, instruction by instruction.

Where the model has nothing to say or is known to be wrong, a rate that was measured on an H100 stands in: cuDNN's
attention, and copies by the bandwidth of the memory (docs/performance.md). Loops count as often as they run.
"""

import collections
import dataclasses
import json
import re

from lorweb_jax.planning.chips import Chip
from lorweb_jax.planning.hlo import Instruction, parse, second, size_of, trips

STREAMED = "from the host's memory"  # beside the others, as far as they leave time
KINDS = ("products", "attention", "elementwise, reductions", "copies, slices", STREAMED)
_IN_HOST_MEMORY = "S(5)"  # in a shape's layout
PHASES = ("forward", "recomputed", "backward")
# cuDNN's share of the peak, forward and backward: 563 and 506 of an H100's 989 TFLOP/s at 8,704 and 2,560 tokens.
_ATTENTION = {False: 0.57, True: 0.51}
_MOVES = {
    *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "copy"),
    *("bitcast", "parameter", "constant"),
}
_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """`times` runs of an instruction, `seconds` all together; `source` is the operation of the program that it is part
    of."""

    kind: str
    phase: str
    times: int
    seconds: float
    name: str
    source: str


def costs(text: str, chip: Chip) -> list[Cost]:
    """Of each instruction of an HLO text that runs something."""
    computations, entry = parse(text)
    rows = []

    def visit(name: str, times: int) -> None:
        by_name = {instruction.name: instruction for instruction in computations.get(name, ())}
        for instruction in by_name.values():
            if instruction.opcode == "while":
                visit(instruction.attribute("body"), times * (trips(instruction, computations) or 1))
            elif instruction.opcode == "call":
                visit(instruction.attribute("to_apply"), times)
            elif instruction.opcode == "conditional":
                continue  # which of its branches runs isn't known; ours have none that matter
            elif instruction.opcode not in _NOTHING and not instruction.opcode.endswith("-done"):
                kind = STREAMED if _streams(instruction, by_name) else _kind(instruction, computations)
                seconds = times * _seconds(instruction, kind, by_name, chip)
                source = (re.search(r'op_name="([^"]*)"', instruction.rest) or ["", ""])[1]
                rows.append(Cost(kind, _phase(source), times, seconds, instruction.name, source))

    visit(entry, 1)
    return rows


def table(rows: list[Cost]) -> dict[str, dict[str, float]]:
    """{kind: {phase: seconds}}"""
    total = {kind: dict.fromkeys(PHASES, 0.0) for kind in KINDS}
    for row in rows:
        total[row.kind][row.phase] += row.seconds
    return total


def _kind(instruction: Instruction, computations: dict[str, list[Instruction]]) -> str:
    target = (re.search(r'custom_call_target="([^"]*)"', instruction.rest) or ["", ""])[1]
    if "fmha" in target:
        return "attention"
    if "matmul" in target or "gemm" in target:
        return "products"
    inside = collections.Counter(each.opcode for each in computations.get(instruction.attribute("calls") or "", ()))
    if inside["dot"] or instruction.opcode == "dot":
        return "products"
    # What XLA makes a plain copy of has nothing else inside; places in a stack are computed beside it.
    if instruction.opcode in ("copy", "copy-start") or "dynamic_memcpy" in instruction.rest:
        return "copies, slices"
    return "copies, slices" if inside and inside.keys() <= _MOVES else "elementwise, reductions"


def _streams(instruction: Instruction, others: dict[str, Instruction]) -> bool:
    """Whether it brings something out of the host's memory."""
    return any(_IN_HOST_MEMORY in others[name].shape for name in instruction.operands() if name in others)


def _phase(source: str) -> str:
    if "rematted" in source:
        return "recomputed"
    return "backward" if "transpose(" in source else "forward"


def _seconds(instruction: Instruction, kind: str, others: dict[str, Instruction], chip: Chip) -> float:
    if kind == "attention":
        backward = "Backward" in instruction.rest
        return _attention_flops(instruction, backward) / (_ATTENTION[backward] * chip.flops)
    if kind == STREAMED:
        started = instruction.opcode.endswith("-start")  # (operands, result, …)
        return size_of(second(instruction.shape) if started else instruction.shape) / chip.host
    written = size_of(instruction.shape)
    if "dynamic_memcpy" in instruction.rest:  # reads of a stack no more than it writes
        return 2 * written / chip.bandwidth
    match = re.search(r'"reification_cost":(\[.*?\])[,}]', instruction.rest)
    models = {cost["name"]: cost["exec_time_us"] / 1e6 for cost in json.loads(match.group(1))} if match else {}
    # "sol" is the model of products and native fusions, the other of Triton's; an estimate below 20 ns is none.
    for name in ("sol", "indexing-cost-model"):
        if models.get(name, 0) > 2e-8:
            return models[name]
    read = sum(size_of(others[name].shape) for name in instruction.operands() if name in others)
    return models.get("") or (read + written) / chip.bandwidth


def _attention_flops(instruction: Instruction, backward: bool) -> float:
    """Two products of [s, s, head width], five on the way back."""
    match = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[(.*?)\]', instruction.rest)
    scores = 1
    for side in re.findall(r"\d+", match.group(1)):
        scores *= int(side)
    width = int(re.search(r"\[[\d,]*?(\d+)\]", instruction.shape).group(1))
    return (10 if backward else 4) * scores * width
