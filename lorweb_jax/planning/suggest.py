"""What would make a plan fit that doesn't: changes of its config, estimated from shapes."""

import dataclasses
import functools
import math
from collections.abc import Iterator

from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.layers import REMAT_POLICIES
from lorweb_jax.nn.sharding import batch_shares
from lorweb_jax.planning import remat
from lorweb_jax.planning.activations import kept_by_example
from lorweb_jax.planning.chips import GIB
from lorweb_jax.planning.figures import Plan, scanned_program
from lorweb_jax.settings.config import get


@dataclasses.dataclass(frozen=True)
class Change:
    """Fields of the config and their new values; `peak` is estimated bytes on a device."""

    values: dict[str, object]
    peak: float

    def flags(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.values.items())


class Estimator:
    """Bytes on a device of a planned config with changes; programs are traced once for each remat policy."""

    def __init__(self, config, plan: Plan):
        self.config, self.plan = config, plan
        self.kept: dict[str, float] = {}  # by policy, see kept_by_example
        # What the estimate misses now, it is taken to miss then.
        self._offset = plan.peak - self._bytes(config)

    @functools.cached_property
    def policies(self) -> dict[str, Change]:
        """What a device holds at the peak by what the backward pass recomputes, the least first; {} of sampling."""
        if self.plan.program.what != "train":
            return {}
        policies = [name for name in REMAT_POLICIES if name != "none" or self.config.offload == "none"]
        return {name: self.change({"remat": name}) for name in policies}

    def change(self, values: dict[str, object]) -> Change:
        """The peak is infinite where the changed config can't run."""
        changed = self.config.copy_and_resolve_references()
        changed.update_from_flattened_dict(values)
        try:
            return Change(values, self._bytes(changed) + self._offset)
        except UserError:
            return Change(values, math.inf)

    def _bytes(self, config) -> float:
        there = self.plan.target
        program = scanned_program(config, there, self.plan.program.what)
        if config.remat not in self.kept:
            self.kept[config.remat] = kept_by_example(program, program.traced(there.gpu))
        return remat.peak(program, self.kept[config.remat])


def suggestions(estimator: Estimator) -> list[Change]:
    """Single changes that suffice; where none does, the fewest of them together that do, or that come nearest."""
    plan = estimator.plan
    sufficient, together, nearest = [], {}, None
    for values in candidates(estimator.config, plan):
        change = estimator.change(values)
        if change.peak <= plan.capacity:
            sufficient.append(change)
        elif not sufficient and change.peak < plan.peak:
            joint = estimator.change(together | values)
            if nearest is None or joint.peak < nearest.peak:
                nearest, together = joint, joint.values
    return sufficient or ([nearest] if nearest else [])


def faster(estimator: Estimator) -> list[Change]:
    """Of a plan that fits, the fastest policy that still fits with a tenth to spare (remat.candidates); none or one."""
    there, used = estimator.plan.target, estimator.config.remat
    names = remat.candidates(estimator.config, there)
    if not estimator.policies or used not in names:
        return []
    changes = [estimator.policies[name] for name in names[: names.index(used)]]
    return [change for change in changes if change.peak <= remat.room(remat.planned(there))][:1]


def candidates(config, plan: Plan) -> Iterator[dict[str, object]]:
    """Fields and values that may make a plan fit, the least costly first."""
    training = plan.program.what == "train"
    if training and config.remat != "full":
        for name in list(REMAT_POLICIES)[1:]:
            if name != config.remat:
                yield {"remat": name}
    if config.train.param_dtype == "float32":
        yield {"train.param_dtype": "bfloat16"}
    if training and config.get("precomputed") == "":  # a pair has no such field
        yield {"precomputed": "local_data/precomputed"}
    if config.quantization == "none":
        yield {"quantization": "int8"}
    if config.offload == "none":
        beside = {"remat": "full"} if training and config.remat == "none" else {}
        yield {"offload": "blocks"} | beside | ({"unstacked": False} if config.unstacked else {})
    if training and config.optimizer.name == "adamw":
        for moments in ("bfloat16", "int8"):
            if moments != config.optimizer.moments:
                yield {"optimizer.moments": moments}
    devices = plan.program.mesh.size
    tensors = [size for size in (1, 2, 4, 8) if devices % size == 0]
    for tensor in tensors:
        mesh = {"mesh.data": 1, "mesh.fsdp": devices // tensor, "mesh.sequence": 1, "mesh.tensor": tensor}
        if dict(plan.program.mesh.shape) != {name.partition(".")[2]: size for name, size in mesh.items()}:
            yield mesh
    shares = batch_shares(plan.program.mesh) if training else 1
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


def lines(estimator: Estimator, changes: list[Change]) -> list[str]:
    """What to tell of its policies, and of `suggestions`, or of `faster` for a plan that fits."""
    peaks = [f"{name} {change.peak / GIB:.2f}" for name, change in estimator.policies.items()]
    head = ["GiB at the peak by --config.remat (estimated): " + ", ".join(peaks)] if peaks else []
    return head + _lines(estimator.plan, changes)


def _lines(plan: Plan, changes: list[Change]) -> list[str]:
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
