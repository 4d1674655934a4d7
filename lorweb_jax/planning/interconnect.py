"""What a device waits for others, by a compiled program's schedule, which is the order of its instructions.

One interconnect serves transfers in the order in which they begin, while the device computes; what remains of one when
its result is needed isn't hidden.
"""

import dataclasses

from lorweb_jax.planning import collectives
from lorweb_jax.planning.hlo import Instruction, inside

ASSUMPTION = "collectives: one after the other over all of a device's connections at their peak, without latency"


@dataclasses.dataclass
class Interconnect:
    """Seconds of all transfers that were begun, of what is done of them, and in which nothing was to be sent."""

    begun: float = 0
    done: float = 0
    idle: float = 0
    ends: dict[str, float] = dataclasses.field(default_factory=dict)

    def begin(self, key: str, seconds: float) -> None:
        self.begun += seconds
        self.ends[key] = self.begun

    def serve(self, seconds: float) -> None:
        """While the device does something else."""
        served = min(self.begun - self.done, seconds)
        self.done += served
        self.idle += seconds - served

    def wait(self, key: str) -> float:
        """Seconds until a transfer, and all that began before it, is done."""
        waited = max(0.0, self.ends.pop(key, 0.0) - self.done)
        self.done += waited
        return waited


def transfers(
    instruction: Instruction, others: dict[str, Instruction], computations: dict[str, list[Instruction]], devices: int
) -> tuple[dict[str, float], list[str]]:
    """{key: bytes} of the collectives that an instruction begins, and the keys of those that it waits for; others:
    those of its computation, by name."""
    start = _start(instruction, others)
    if instruction.opcode.endswith("-done"):
        return {}, [start.name]
    # A start without operands is given them by an update, as of what a TPU's SparseCore sends.
    if start.opcode == "async-start" and (instruction is start) != bool(start.operands()):
        return {}, []
    within = _within(start, computations)
    members = [start] if collectives.kind_of(start) else [*filter(collectives.kind_of, within)]
    begun = {_key(each): collectives.sent(collectives.kind_of(each), each, devices) for each in members}
    if not members:
        return {}, []
    if start.opcode.endswith("-start"):
        return {start.name: sum(begun.values())}, []
    if not any("async_collective_fusion_config" in each.rest for each in members):
        return begun, list(begun)
    # One of a chain of fusions, which compute meanwhile.
    first = any('"AsyncCollectiveStart"' in each.rest for each in within)
    last = any('"AsyncCollectiveDone"' in each.rest for each in within)
    return begun if first else {}, list(begun) if last else []


def _start(instruction: Instruction, others: dict[str, Instruction]) -> Instruction:
    """What an asynchronous operation began with, of its updates and its end; any other instruction itself."""
    while instruction.opcode.endswith(("-update", "-done")) and instruction.operands()[0] in others:
        instruction = others[instruction.operands()[0]]
    return instruction


def _within(instruction: Instruction, computations: dict[str, list[Instruction]]) -> list[Instruction]:
    """What it fuses or starts, and what that calls."""
    direct = inside(instruction, computations)
    called = filter(None, map(collectives.called_by, direct))
    return [*direct, *(each for name in called for each in computations.get(name, []))]


def _key(collective: Instruction) -> str:
    return collective.attribute("channel_id") or collective.name
