"""What would make a plan fit that doesn't: changes of its config, estimated from shapes."""

import dataclasses
import math
from collections.abc import Iterator

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.layers import REMAT_POLICIES
from lorweb_jax.planning.activations import estimate, kept_by_example
from lorweb_jax.planning.chips import GIB
from lorweb_jax.planning.figures import Plan, arguments, make_program
from lorweb_jax.planning.shapes import device_bytes
from lorweb_jax.settings.config import get


@dataclasses.dataclass(frozen=True)
class Change:
    """Fields of the config and their new values; `peak` is estimated bytes on a device."""

    values: dict[str, object]
    peak: float

    def flags(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.values.items())


def suggestions(config, plan: Plan) -> list[Change]:
    """Single changes that suffice; where none does, the fewest of them together that do, or that come nearest."""
    estimator = _Estimator(plan)
    # What the estimate misses now, it is taken to miss then.
    offset = plan.peak - estimator.bytes(config)
    sufficient, together, nearest = [], {}, None
    for values in _candidates(config, plan):
        change = Change(values, estimator.changed(config, values) + offset)
        if change.peak <= plan.capacity:
            sufficient.append(change)
        elif not sufficient and change.peak < plan.peak:
            joint = Change(together | values, estimator.changed(config, together | values) + offset)
            if nearest is None or joint.peak < nearest.peak:
                nearest, together = joint, joint.values
    return sufficient or ([nearest] if nearest else [])


def faster(config, plan: Plan) -> list[Change]:
    """Of a plan that fits, the policy that recomputes least and still fits with a tenth to spare; none or one."""
    if plan.program.what != "train":
        return []
    estimator, order = _Estimator(plan), tuple(REMAT_POLICIES)
    offset = plan.peak - estimator.bytes(config)
    for remat in order[: order.index(config.remat)]:
        change = Change({"remat": remat}, estimator.changed(config, {"remat": remat}) + offset)
        if change.peak <= 0.9 * plan.capacity:
            return [change]
    return []


class _Estimator:
    """Bytes on a device of changed configs; programs are traced once for each remat policy."""

    def __init__(self, plan: Plan):
        self._plan, self._kept = plan, {}

    def changed(self, config, values: dict[str, object]) -> float:
        """Infinite where the changed config can't run."""
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(values)
        try:
            return self.bytes(changed)
        except UserError:
            return math.inf

    def bytes(self, config) -> float:
        program = make_program(config, self._plan.target, self._plan.program.what)
        if config.remat not in self._kept:
            self._kept[config.remat] = kept_by_example(program, program.traced())
        return (
            sum(arguments(program).values())
            + device_bytes(program.gradients)
            + estimate(program, self._kept[config.remat]).total
        )


def _candidates(config, plan: Plan) -> Iterator[dict[str, object]]:
    training = plan.program.what == "train"
    if training and config.remat != "full":
        for remat in list(REMAT_POLICIES)[1:]:
            if remat != config.remat:
                yield {"remat": remat}
    if config.train.param_dtype == "float32":
        yield {"train.param_dtype": "bfloat16"}
    if training and config.get("precomputed") == "":  # a pair has no such field
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
    shares = devices // plan.program.mesh.shape["tensor"] if training else 1
    parts = 2 * config.train.accumulate
    while training and config.train.batch % (parts * shares) == 0:
        yield {"train.accumulate": parts}
        parts *= 2
    field = "train.batch" if training else "evaluation.batch"
    shares *= config.train.accumulate if training else 1
    batch = get(config, field) // 2 // shares * shares
    while batch:
        yield {field: batch}
        batch = batch // 2 // shares * shares


def lines(plan: Plan, changes: list[Change]) -> list[str]:
    """What to tell of `suggestions`, or of `faster` for a plan that fits."""
    shown = [f"  {change.flags()}   {change.peak / GIB:.2f} of {plan.capacity / GIB:.2f} GiB" for change in changes]
    if plan.fits:
        return ["there is room to recompute less (estimated):", *shown] if changes else []
    if not changes:
        return ["no single setting, nor all of them together, makes it fit; take more or larger devices"]
    if changes[0].peak > plan.capacity:
        head = "nothing makes it fit; this comes nearest (estimated), so take more or larger devices:"
    else:
        head = f"{'any one of these' if len(changes) > 1 else 'this'} would make it fit (estimated):"
    return [head, *shown]
