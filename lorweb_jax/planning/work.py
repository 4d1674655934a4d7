"""FLOPs of a program: what the model asks for, what its frozen encoders add, and what remat recomputes.

The first is counted from sizes (planning/flops.py); the last is what the traced program multiplies beyond that.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.extend

from lorweb_jax.planning.flops import base_flops
from lorweb_jax.planning.program import Program


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of a step (all steps, when sampling) over all devices."""

    model: float
    encoders: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.model + self.encoders + self.recomputed


def work(program: Program, traced: Sequence[jax.stages.Traced]) -> Work:
    model, encoders = model_flops(program), sum(products(part.jaxpr.jaxpr) for part in traced[:-1])
    recomputed = products(traced[-1].jaxpr.jaxpr) - model if program.what == "train" else 0
    return Work(model, encoders, recomputed)


def model_flops(program: Program) -> float:
    """Transformer and adapters, forward and (in training) backward to what is trained, in all passes of a step."""
    job, folder = program.job, program.job.folder
    kind, passes = ("basis", job.passes) if program.what == "train" else ("forward", program.steps)
    flops = base_flops(kind, folder.backbone, program.batch, job.sequence, folder.text_tokens)
    if "folded weights" not in program.groups:
        flops += job.adapter_flops(kind, program.batch)
    return flops * passes


def products(jaxpr, live: Sequence[bool] | None = None) -> float:
    """FLOPs of all matrix products and convolutions of a jaxpr, as often as loops and kernels' grids run them.

    live: which outputs are wanted (None: all). What nothing wanted depends on isn't counted, as no compiler keeps it.
    """
    outputs = [out for out, wanted in zip(jaxpr.outvars, live or [True] * len(jaxpr.outvars), strict=True) if wanted]
    needed = {out for out in outputs if isinstance(out, jax.extend.core.Var)}
    total = 0.0
    for equation in reversed(jaxpr.eqns):
        used = [out in needed for out in equation.outvars]
        if any(used) or equation.effects:
            needed |= {variable for variable in equation.invars if isinstance(variable, jax.extend.core.Var)}
            total += _products(equation, used)
    return total


def _products(equation, used: list[bool]) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * inner * math.prod(equation.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(kernel) // outputs * math.prod(equation.outvars[0].aval.shape)
    if name == "cond":
        return max(products(branch.jaxpr) for branch in params["branches"])
    if name == "scan":  # what is carried may be wanted by the next turn
        used = [True] * carried(equation) + used[carried(equation) :]
    return _times(name, params) * sum(
        products(inner, used if len(inner.outvars) == len(used) else None)
        for inner in jax.extend.core.jaxprs_in_params(params)
    )


def carried(scan) -> int:
    """How many of a scan equation's outputs, the first ones, are its carry; the others are stacked and so have one axis
    more than its body's. Counted so because the parameter that says it has other names in other versions of jax."""
    body = scan.params["jaxpr"].jaxpr.outvars
    return sum(out.aval.ndim == inner.aval.ndim for out, inner in zip(scan.outvars, body, strict=True))


def _times(name: str, params: dict) -> int:
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # its body is what one device does
        return params["mesh"].size
    return 1
