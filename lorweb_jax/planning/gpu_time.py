"""How long instructions of a compiled GPU program take, by the cost model of its compiler.

Where the model has nothing to say or is known to be wrong, a rate that was measured on an H100 stands in: cuDNN's
attention, and copies by the bandwidth of the memory (docs/performance.md).
"""

import json
import re

from lorweb_jax.planning.chips import Chip
from lorweb_jax.planning.estimated_time import Computations, Instructions, kind_by_opcodes, moved
from lorweb_jax.planning.hlo import Instruction, size_of

# cuDNN's share of the peak, forward and backward: 563 and 506 of an H100's 989 TFLOP/s at 8,704 and 2,560 tokens.
_ATTENTION = {False: 0.57, True: 0.51}
_KERNELS = 0.9  # of the memory's bandwidth


def assumptions(chip: Chip) -> list[str]:
    """What `model` takes for granted."""
    return [
        "the compiler's cost model; one H100 and one H200 took 3 to 10 % more than it said",
        f"cuDNN's attention: {100 * _ATTENTION[False]:.0f} % of the peak, backward {100 * _ATTENTION[True]:.0f} %, "
        "as on an H100",
        f"what the model says nothing of: its bytes, at {chip.bandwidth / 1e9:.0f} GB/s; Pallas kernels: operands and "
        f"results, at {100 * _KERNELS:.0f} % of that",
    ]


def model(instruction: Instruction, others: Instructions, computations: Computations, chip: Chip) -> tuple[str, float]:
    """Its kind and seconds, once."""
    kind = _kind(instruction, computations)
    if kind == "attention":
        backward = "Backward" in instruction.rest
        return kind, _attention_flops(instruction, backward) / (_ATTENTION[backward] * chip.flops)
    if kind == "Pallas kernels":
        return kind, moved(instruction, others) / (_KERNELS * chip.bandwidth)
    if "dynamic_memcpy" in instruction.rest:  # reads of a stack no more than it writes
        return kind, 2 * size_of(instruction.shape) / chip.bandwidth
    match = re.search(r'"reification_cost":(\[.*?\])[,}]', instruction.rest)
    models = {cost["name"]: cost["exec_time_us"] / 1e6 for cost in json.loads(match.group(1))} if match else {}
    # "sol" is the model of products and native fusions, the other of Triton's; an estimate below 20 ns is none.
    for name in ("sol", "indexing-cost-model"):
        if models.get(name, 0) > 2e-8:
            return kind, models[name]
    return kind, models.get("") or moved(instruction, others) / chip.bandwidth


def _kind(instruction: Instruction, computations: Computations) -> str:
    target = (re.search(r'custom_call_target="([^"]*)"', instruction.rest) or ["", ""])[1]
    if "fmha" in target:
        return "attention"
    if "matmul" in target or "gemm" in target:
        return "products"
    if target == "__gpu$xla.gpu.triton" or target.startswith("mosaic_gpu"):
        return "Pallas kernels"
    return "copies, slices" if "dynamic_memcpy" in instruction.rest else kind_by_opcodes(instruction, computations)


def _attention_flops(instruction: Instruction, backward: bool) -> float:
    """Two products of [s, s, head width], five on the way back."""
    match = re.search(r'"intermediate_tensor_shape": ?\{.*?"dimensions": ?\[(.*?)\]', instruction.rest)
    scores = 1
    for side in re.findall(r"\d+", match.group(1)):
        scores *= int(side)
    width = int(re.search(r"\[[\d,]*?(\d+)\]", instruction.shape).group(1))
    return (10 if backward else 4) * scores * width
