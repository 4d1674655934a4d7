"""train_*.npz: passes of the published training loop, from latents to parameters after the optimizer's step."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorweb_jax.adapters import pair
from lorweb_jax.adapters.basis import BasisParam
from lorweb_jax.adapters.members import Members, trained_part
from lorweb_jax.flow.loss import weighted_mse
from lorweb_jax.flow.schedule import pair_times
from lorweb_jax.pipeline.pair_model import PairModel
from lorweb_jax.settings.config import base_config
from lorweb_jax.training.optimizer import make_optimizer
from parity.folder import RecordedModels, Recording
from parity.pair import names
from parity.report import COEFFICIENT, OUTPUT, Absent, Comparison, Tolerance
from parity.training import tokens

LOSS, GRADIENT = Tolerance(1e-5), Tolerance(2e-5)
Parameters = dict[tuple, jax.Array]  # of one member, by path


class Pass(NamedTuple):
    """A pass of an update: which one, where its recorded arrays are, and the parameters that it saw."""

    which: str
    key: str
    parameters: dict[str, Parameters]


class Replay:
    """The recorded run, replayed along our own gradients: `passes` in their order, `gradients` of each."""

    def __init__(self, data: Recording, case: dict, models: RecordedModels):
        self.data, self.case, self.models = data, case, models
        members = start(data, case, models)
        self.graphdef, trained, self.rest = nnx.split(members, BasisParam, ...)
        self.variables = {
            name: {path: value for path, value in nnx.to_flat_state(trained) if trained_part(name)(path, value)}
            for name in pair.MEMBERS
        }
        self.optimizer = _optimizer(case)
        self.first = {
            name: {path: variable[...] for path, variable in variables.items()}
            for name, variables in self.variables.items()
        }

    def members(self, parameters: dict[str, Parameters]) -> Members:
        flat = {
            path: self.variables[name][path].replace(value)
            for name, values in parameters.items()
            for path, value in values.items()
        }
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat), self.rest)

    @functools.cached_property
    def passes(self) -> dict[str, tuple[Pass, Parameters]]:
        """{key: (a pass, its member's parameters after it)}, run on our own gradients, each clipped by its norm."""
        parameters, done = dict(self.first), {}
        states = {name: self.optimizer.init(values) for name, values in parameters.items()}
        for update in range(self.case["updates"]):
            for which in pair.MEMBERS:
                if which == "style" and update < self.case["style_start_update"]:
                    continue
                now = Pass(which, f"it{update}/{which}", dict(parameters))
                gradient = self.gradient(now)[2]
                changes, states[which] = self.optimizer.update(gradient, states[which], parameters[which])
                parameters[which] = optax.apply_updates(parameters[which], changes)
                done[now.key] = now, parameters[which]
        return done

    def gradient(self, now: Pass, update: str | None = None):
        """(loss, velocity, gradient of the pass's own member); `update` names the recorded draws ("it0")."""
        data, which = self.data, now.which
        update = update or now.key.partition("/")[0]
        noise, time = jnp.asarray(data[f"{update}/noise"]), jnp.asarray(data[f"{update}/t"]).reshape(1)
        others = {name: values for name, values in now.parameters.items() if name != which}
        text, pooled = (
            np.concatenate([data[f"{name}/{key}"] for name in pair.MEMBERS])
            for key in ("encoder_hidden_states", "pooled_projections")
        )
        (loss, velocity), gradient = self._run(which)(
            now.parameters[which],
            others,
            (self.models.transformer, self.models.vae),
            (text, pooled),
            tokens(self.latents(which, update)),
            noise,
            time,
        )
        return loss, velocity, gradient

    @functools.cache  # noqa: B019 (a replay lives as long as its file is checked)
    def _run(self, which: str):
        size = self.data["content_image"].shape[:2]

        def loss(own, others, parts, captions, x0, noise, time):
            (transformer, vae), (text, pooled) = parts, captions
            model = PairModel(
                backbone=self.models.backbone,
                transformer=transformer,
                vae=vae,
                members=self.members(others | {which: own}),
                text=text,
                pooled=pooled,
            )
            velocity = model.pass_velocity(which, x0, noise, time, self.case["guidance"], size)
            return weighted_mse(velocity, noise - x0, jnp.ones(1))[0], velocity

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    def latents(self, which: str, update: str) -> jax.Array:
        """A sample of the autoencoder's posterior by the recorded noise, [1, c, h, w]."""
        mean, log_variance = (self.data[f"{which}/vae_{part}"] for part in ("mean", "logvar"))
        noise, config = self.data[f"{update}/{which}_posterior_eps"], self.models.vae.config
        return (mean + np.exp(0.5 * log_variance) * noise - config.shift_factor) * config.scaling_factor

    def tensor(self, which: str, values: Parameters, name: str) -> np.ndarray:
        """The published tensor `name` of a member with these parameters."""
        return names.read(self.members(self.first | {which: values}).member(which), names.parse(name))


def check_train(report: Comparison, name: str, data: Recording, case: dict, models: RecordedModels) -> None:
    replay = functools.cache(lambda: Replay(data, case, models))
    results = functools.cache(lambda key: replay().gradient(replay().passes[key][0]))
    for key, theirs in data.items():
        line = f"{name} {key}"
        if match := re.fullmatch(r"(it\d+)/(content|style)_latents", key):
            report.compare(line, lambda m=match: replay().latents(m[2], m[1]), theirs, OUTPUT)
        elif match := re.fullmatch(r"(it\d+)/t", key):
            index = int(data[f"{key}_index"])
            report.compare(line, lambda index=index: pair_times()[index], theirs, COEFFICIENT)
        elif match := re.fullmatch(r"(it\d+/(content|style))/(velocity|loss|grad_norm)", key):
            report.compare(line, lambda m=match: _quantity(results(m[1]), m[3]), theirs, _tolerance(match[3]))
        elif match := re.fullmatch(r"(it\d+/(content|style))/grad/(.+)", key):
            report.compare(line, lambda m=match: replay().tensor(m[2], results(m[1])[2], m[3]), theirs, GRADIENT)
        elif match := re.fullmatch(r"it(\d+)/(content|style)/after/(.+)", key):
            _check_after(report, line, data, case, replay, match, theirs)
        elif match := re.fullmatch(r"joint/style/(velocity|loss|grad_norm|grad/.+)", key):
            _check_joint(report, line, replay, match[1], theirs)
        elif key == "joint/grad_norm":
            report.compare(line, lambda: _joint_norm(replay()), theirs, LOSS)
        elif match := re.fullmatch(r"final/(.+)", key):
            tolerance = Tolerance(0.02 * case["learning_rate"] * theirs.size**0.5, relative=False)
            report.compare(
                line, lambda m=match, theirs=theirs: [np.linalg.norm(_final(replay(), m[1]) - theirs)], [0.0], tolerance
            )


def _check_after(report, line, data, case, replay, match, theirs) -> None:
    """Along the recorded gradients element by element, and along our own by the root mean square."""
    update, which, name = int(match[1]), match[2], match[3]
    rate, key = case["learning_rate"], f"it{update}/{which}"
    first = case["style_start_update"] if which == "style" else 0
    recorded = [f"it{index}/{which}" for index in range(first, update + 1)]
    if all(f"{step}/grad/{name}" in data for step in recorded):

        def by_recorded_gradients():
            values = replay().tensor(which, replay().first[which], name)
            optimizer, state = _optimizer(case), None
            for step in recorded:
                gradient = data[f"{step}/grad/{name}"] * min(1.0, case["max_grad_norm"] / data[f"{step}/grad_norm"])
                state = state or optimizer.init(values)
                # The gradient is clipped by the norm of all layers, so that of one layer is within the limit.
                changes, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, values)
                values = optax.apply_updates(values, changes)
            return values

        report.compare(
            f"{line} by the recorded gradients", by_recorded_gradients, theirs, Tolerance(1e-3 * rate, relative=False)
        )

    def root_mean_square():
        ours = replay().tensor(which, replay().passes[key][1], name)
        return [np.sqrt(np.mean((ours - theirs) ** 2))]

    report.compare(f"{line} by ours", root_mean_square, [0.0], Tolerance(0.02 * rate, relative=False))


def _check_joint(report, line, replay, what: str, theirs) -> None:
    """The style pass of the first update with the content as it was before that update."""
    before = functools.cache(lambda: replay().gradient(Pass("style", "it0/style", replay().first)))
    if what.startswith("grad/"):
        report.compare(line, lambda: replay().tensor("style", before()[2], what[5:]), theirs, GRADIENT)
    else:
        report.compare(line, lambda: _quantity(before(), what), theirs, _tolerance(what))


def _joint_norm(replay: Replay) -> jax.Array:
    gradients = [replay.gradient(Pass(which, f"it0/{which}", replay.first))[2] for which in pair.MEMBERS]
    return optax.tree.norm(gradients)


def _final(replay: Replay, name: str) -> np.ndarray:
    which = names.parse(name).member
    last = max((key for key in replay.passes if key.endswith(f"/{which}")), key=lambda key: int(key[2:].split("/")[0]))
    return replay.tensor(which, replay.passes[last][1], name)


def _quantity(result, what: str):
    loss, velocity, gradient = result
    return {"loss": loss, "velocity": velocity, "grad_norm": optax.tree.norm(gradient)}[what]


def _tolerance(what: str) -> Tolerance:
    return OUTPUT if what == "velocity" else LOSS


def _optimizer(case: dict) -> optax.GradientTransformation:
    if case["eps"] != 1e-8:
        raise Absent(f"it has eps {case['eps']}, and training has AdamW's 1e-8")
    config = base_config("pair")
    config.optimizer.b1, config.optimizer.b2 = case["betas"]
    for field, key in (("learning_rate",) * 2, ("weight_decay",) * 2, ("clip", "max_grad_norm")):
        config.optimizer[field] = case[key]
    return make_optimizer(config)


def start(data: Recording, case: dict, models: RecordedModels) -> Members:
    """Members with the recorded A's, and B's where they don't begin at zero."""
    members = names.empty_members(case, models.layers)
    for which in pair.MEMBERS:
        member = members.member(which)
        member = pair.Member(
            {path: a.copy() for path, a in member.a.items()},
            {path: b.copy() for path, b in member.b.items()},
            member.blocks,
        )
        for path, a in member.a.items():
            shared = data.get(f"A/{which}_{a.shape[2]}")
            if shared is not None:
                a[list(member.blocks[path])] = shared
        for key, values in data.items():
            if key.startswith("init/"):
                tensor = names.parse(key.removeprefix("init/"))
                own = tensor.block in member.blocks.get(tensor.paths[0], ())
                if own and tensor.member in (None, which):
                    names.write(member, tensor, values)
        members.fill(which, member)
    return members
