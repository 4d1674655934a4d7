"""How long instructions of a compiled TPU program take: the cycles that libtpu writes beside them, and stated rates for
what has none: Pallas calls, and products that are joined with a collective.
"""

import math
import re

from lorweb_jax.planning.chips import Chip
from lorweb_jax.planning.estimated_time import Computations, Instructions, kind_by_opcodes, moved
from lorweb_jax.planning.hlo import Instruction, axes, inside, operand_shapes

# Hz of the cycles. v4: its paper (Jouppi et al. 2023), v5e and v5p: the peak over what four or eight MXUs of 128 x 128
# multiply in a cycle; v6e as v5p. Large products then come to nine tenths of the peak on each. Of tpu7x nobody says.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
_MXU = {"v4": 128, "v5e": 128, "v5p": 128, "v6e": 256}  # its sides; heads that are narrower leave the rest idle
_ATTENTION = 0.7  # of what the heads' width leaves of the peak, as softmax runs beside the products; not measured
_KERNELS = 0.9  # of the memory's bandwidth
_JOINED = 0.65  # of the peak, as products with an estimate reach in configs/basis.py:kontext_16


def assumptions(chip: Chip) -> list[str]:
    """What `model` takes for granted."""
    return [
        f"libtpu's cycles at {CLOCKS[chip.name] / 1e9:g} GHz; what has none takes no time, nor do copies between HBM "
        "and VMEM in the background",
        f"splash attention, which has none: {100 * _attention(128, chip):.0f} % of the peak with heads 128 wide, "
        f"{100 * _ATTENTION:.0f} % of what MXUs {_MXU[chip.name]} wide do with them; not measured",
        f"other Pallas kernels: operands and results, at {100 * _KERNELS:.0f} % of {chip.bandwidth / 1e9:.0f} GB/s",
        f"products joined with a collective, if they have none: {100 * _JOINED:.0f} % of the peak",
    ]


def model(instruction: Instruction, others: Instructions, computations: Computations, chip: Chip) -> tuple[str, float]:
    """Its kind and seconds, once."""
    kind = _kind(instruction, computations)
    match = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    if match and match.group(1) != "0":
        return kind, int(match.group(1)) / CLOCKS[chip.name]
    if kind == "attention":
        flops, width = _attention_flops(instruction, others)
        return kind, flops / (_attention(width, chip) * chip.flops)
    if kind == "Pallas kernels":
        return kind, moved(instruction, others) / (_KERNELS * chip.bandwidth)
    if kind == "products":
        fused = {each.name: each for each in inside(instruction, computations)}
        flops = sum(_product_flops(each, fused or others) for each in fused.values() or [instruction])
        return kind, flops / (_JOINED * chip.flops)
    return kind, 0


def _kind(instruction: Instruction, computations: Computations) -> str:
    if '"tpu_custom_call"' in instruction.rest:
        return "attention" if "splash" in instruction.rest else "Pallas kernels"
    return kind_by_opcodes(instruction, computations)


def _attention(width: int, chip: Chip) -> float:
    """Share of the peak that heads of this width reach."""
    return _ATTENTION * min(1, width / _MXU[chip.name])


def _attention_flops(instruction: Instruction, others: Instructions) -> tuple[float, int]:
    """FLOPs, and the heads' width: of q [..., s, width] and k [..., t, width] two products, five on the way back, where
    one kernel makes all gradients (nn/attention.py)."""
    shapes = operand_shapes(instruction, others)
    q, k = [axes(shape) for shape in shapes if not shape.startswith("s")][:2]  # after the masks' integers
    return 2 * (5 if "dkv" in instruction.name else 2) * math.prod(q) * k[-2], q[-1]


def _product_flops(product: Instruction, others: Instructions) -> float:
    """2 · results · what is summed for each: a convolution's features and window; an axis of a batch is written as a
    window over a left side that is spread as far. 0 of anything else."""
    if product.opcode != "convolution":
        return 0
    kernel = axes(operand_shapes(product, others)[1])
    summed = kernel[re.search(r"dim_labels=\w+_(\w+)->", product.rest).group(1).index("i")]
    if window := re.search(r"window=\{(.*?)\}", product.rest):
        fields = dict(field.split("=") for field in window.group(1).split())
        sizes = fields["size"].split("x")
        spread = fields.get("lhs_dilate", "x".join("1" * len(sizes))).split("x")
        summed *= math.prod(int(size) for size, by in zip(sizes, spread, strict=True) if by == "1")
    return 2 * math.prod(axes(product.shape)) * summed
