"""What would make a plan fit that doesn't: changes of its config, estimated from shapes."""

import dataclasses
from collections.abc import Iterator

from lorweb_jax.config import get
from lorweb_jax.errors import UserError
from lorweb_jax.planning.activations import estimate
from lorweb_jax.planning.chips import GIB
from lorweb_jax.planning.figures import Plan, arguments, make_program
from lorweb_jax.planning.shapes import device_bytes


@dataclasses.dataclass(frozen=True)
class Change:
    """Fields of the config and their new values; `peak` is estimated bytes on a device."""

    values: dict[str, object]
    peak: float

    def flags(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.values.items())


def suggestions(config, plan: Plan) -> list[Change]:
    """Single changes that suffice; where none does, the fewest of them together that do, or that come nearest."""
    # What the estimate misses now, it is taken to miss then.
    offset = plan.peak - _estimated(config, plan)
    found, together, taken = [], {}, None
    for values in _candidates(config, plan):
        peak = _peak(config, plan, values)
        if peak is None:
            continue
        change = Change(values, peak + offset)
        if change.peak <= plan.capacity:
            found.append(change)
        elif not found:
            joint = _peak(config, plan, together | values)
            if joint is not None and (taken is None or joint + offset < taken.peak):
                together = together | values
                taken = Change(together, joint + offset)
    return found or ([taken] if taken else [])


def _candidates(config, plan: Plan) -> Iterator[dict[str, object]]:
    training = plan.program.what == "train"
    if training and config.remat != "full":
        for remat in ("dots", "attention", "full"):
            if remat != config.remat:
                yield {"remat": remat}
    if config.train.frozen_dtype == "float32":
        yield {"train.frozen_dtype": "bfloat16"}
    if not config.precomputed and training:
        yield {"precomputed": "local_data/precomputed"}
    if config.quantization == "none":
        yield {"quantization": "int8"}
    if training and config.optimizer.name == "adamw":
        for moments in ("bfloat16", "int8"):
            if moments != config.optimizer.moments:
                yield {"optimizer.moments": moments}
    devices = plan.program.mesh.size
    tensors = [size for size in (1, 2, 4, 8) if devices % size == 0]
    for tensor in tensors:
        mesh = {"mesh.data": 1, "mesh.fsdp": devices // tensor, "mesh.tensor": tensor}
        if dict(plan.program.mesh.shape) != {name.partition(".")[2]: size for name, size in mesh.items()}:
            yield mesh
    field = "train.batch" if training else "show.batch"
    shares = devices // plan.program.mesh.shape["tensor"] if training else 1
    batch = get(config, field) // 2 // shares * shares
    while batch:
        yield {field: batch}
        batch = batch // 2 // shares * shares


def _peak(config, plan: Plan, values: dict[str, object]) -> float | None:
    """None where the changed config can't run."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(values)
    try:
        return _estimated(changed, plan)
    except UserError:
        return None


def _estimated(config, plan: Plan) -> float:
    program = make_program(config, plan.target, plan.program.what)
    return (sum(arguments(program).values()) + device_bytes(program.gradients)
            + estimate(program, program.traced()).total)


def lines(plan: Plan, changes: list[Change]) -> list[str]:
    if not changes:
        return ["no single setting, nor all of them together, makes it fit; take more or larger devices"]
    enough = changes[0].peak <= plan.capacity
    head = ("any one of these would make it fit (estimated):" if enough else
            "nothing makes it fit; this comes nearest (estimated), so take more or larger devices:")
    if enough and len(changes) == 1:
        head = "this would make it fit (estimated):"
    return [head, *(f"  {change.flags()}   {change.peak / GIB:.2f} of {plan.capacity / GIB:.2f} GiB"
                    for change in changes)]
