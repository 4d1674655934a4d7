"""Training, from a config to an exported result; read it from top to bottom.

devices and mesh → the job's data and model, shapes first → split by the job's trainable Variable type →
optimizer → latest checkpoint, if there is one → one jitted, donated step → the loop → export.

What is trained is chosen once, by one NNX filter (`Layout`): gradient, optimizer, average, checkpoint and export
see the trainables alone, as a dict {dotted path: array}; frozen weights are arguments of the step and nothing else.
"""

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from lorweb_jax import config as configs
from lorweb_jax import sharding
from lorweb_jax.errors import UserError
from lorweb_jax.training import pictures
from lorweb_jax.training.checkpoints import Checkpoints, open_run
from lorweb_jax.training.job import Batch, Job
from lorweb_jax.training.jobs import make_job
from lorweb_jax.training.optimizer import averaged, make_optimizer, make_schedule
from lorweb_jax.training.report import Report

Arrays = dict[str, jax.Array]  # by dotted path


def train(config, workdir: Path) -> None:
    """Train as `config` says, going on from the newest checkpoint in `workdir`; files of the run end up there.

    Raises UserError for a config, folder or batch that cannot work, and when the loss is no longer finite.
    """
    configs.check(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.train.batch, mesh)
    open_run(workdir, config)
    job = make_job(config)
    data = job.data(config)

    layout = Layout.of(job, config.seed)
    optimizer = make_optimizer(config)
    shapes = place(mesh, {name: jax.ShapeDtypeStruct(shape.shape, jnp.float32)
                          for name, shape in layout.shapes("trainable").items()})
    opt_shapes = place(mesh, jax.eval_shape(optimizer.init, shapes))
    frozen = frozen_weights(job, layout, config, mesh)
    print(f"{config.job}: {count(shapes):,} trained and {count(frozen):,} frozen parameters, "
          f"{mesh.size} device{'s' * (mesh.size > 1)}, run folder {workdir}", flush=True)

    with contextlib.ExitStack() as closing:
        closing.callback(getattr(data, "close", lambda: None))  # a grain iterator's worker processes
        checkpoints = Checkpoints(workdir)
        closing.callback(checkpoints.close)
        first_step, log_state = checkpoints.latest() or 0, []
        if first_step:
            trainable, opt_state, data_state, log_state = checkpoints.restore(first_step, shapes, opt_shapes)
            data.set_state(data_state)
            print(f"going on from step {first_step}", flush=True)
        else:
            trainable = initial_trainables(job, layout, config, mesh)
            opt_state = jax.jit(optimizer.init, out_shardings=shardings_of(opt_shapes))(trainable)
        report = Report(workdir, config, first_step, log_state)
        closing.callback(report.close)
        stop = StopRequest()
        closing.callback(stop.restore)

        train_step = jax.jit(make_train_step(job, layout, optimizer, config.seed), donate_argnums=(0, 1))
        schedule = make_schedule(config)
        every, steps = config.train, config.train.steps

        def shown_model() -> nnx.Module:
            average = averaged(opt_state)
            return layout.model(trainable if average is None else average, frozen)

        for step in range(first_step, steps):
            batch = next_batch(job, data, mesh)
            trainable, opt_state, metrics = train_step(trainable, opt_state, frozen, batch, np.uint32(step))
            report.add(step, metrics)
            done = step + 1
            if done % every.log_every == 0 or done == steps:
                report.write(done, float(schedule(step)))
            if done % every.checkpoint_every == 0 or done == steps or stop.requested:
                # report.state() comes first: it refuses a loss that is not finite.
                log_state = report.state()
                checkpoints.save(done, trainable, opt_state, data.get_state(), log_state)
            if stop.requested and done < steps:
                checkpoints.finish()
                print(f"stopped by SIGTERM after step {done}, checkpoint written; "
                      "the same command goes on from there", flush=True)
                return
            if done % every.picture_every == 0 or done == steps:
                images = job.show(shown_model(), done)
                report.pictures(done, images)
                pictures.save(workdir / "pictures", done, images)
                report.restart_clock(done)
        checkpoints.finish()
        job.finish(shown_model(), workdir)
        print(f"finished at step {max(first_step, steps)}; results are in {workdir}", flush=True)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A job's model without its arrays: its structure, and {dotted path: (path, Variable of a shape)} of a part."""

    graphdef: nnx.GraphDef
    trainable: dict[str, tuple[tuple, nnx.Variable]]
    frozen: dict[str, tuple[tuple, nnx.Variable]]

    @classmethod
    def of(cls, job: Job, seed: int) -> "Layout":
        """From job.build, traced; UserError if nothing in the model is trainable."""
        graphdef, trainable, frozen = split(job, nnx.eval_shape(lambda: job.build(nnx.Rngs(seed))))
        if not trainable:
            raise UserError(f"the model has no {job.trainable.__name__} that the job's filter would train; "
                            "check `trainable` and `trainable_filter` of the job")
        return cls(graphdef, _by_path(trainable), _by_path(frozen))

    def shapes(self, part: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes by dotted path of the part "trainable" or "frozen"."""
        return {name: variable.get_value() for name, (_, variable) in getattr(self, part).items()}

    def model(self, trainable: Arrays, frozen: Arrays) -> nnx.Module:
        """The model that holds these arrays."""
        variables = {path: variable.replace(trainable[name]) for name, (path, variable) in self.trainable.items()}
        variables |= {path: variable.replace(frozen[name]) for name, (path, variable) in self.frozen.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(variables))


def split(job: Job, model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(structure, trainable, frozen) of a model: the one place where the job's filter is used."""
    return nnx.split(model, getattr(job, "trainable_filter", job.trainable), ...)


def _by_path(state: nnx.State) -> dict[str, tuple[tuple, nnx.Variable]]:
    return {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


def initial_trainables(job: Job, layout: Layout, config, mesh: Mesh) -> Arrays:
    """The weights to start from, float32: what the job reads (`initial`), and for the rest what it builds."""
    built = _built(job, "trainable", config, jnp.dtype("float32"), mesh)
    if hasattr(job, "initial"):
        built |= _loaded(job.initial(layout.shapes("trainable")), layout.trainable, jnp.dtype("float32"), mesh)
    return built


def frozen_weights(job: Job, layout: Layout, config, mesh: Mesh) -> Arrays:
    """The frozen weights, floating ones as config.train.frozen_dtype: read by the job, or built if it reads none."""
    dtype = jnp.dtype(config.train.frozen_dtype)
    if not hasattr(job, "frozen"):
        return _built(job, "frozen", config, dtype, mesh)
    frozen = _loaded(job.frozen(layout.shapes("frozen")), layout.frozen, dtype, mesh)
    if missing := sorted(layout.frozen.keys() - frozen.keys()):
        raise UserError(f"{len(missing)} frozen weights are missing, {missing[0]} first; "
                        "check that the files and the config's sizes belong together")
    return frozen


def _built(job: Job, part: str, config, dtype: jnp.dtype, mesh: Mesh) -> Arrays:
    """One part of the job's fresh model, made where it will live; the other part is never computed."""
    def arrays() -> Arrays:
        _, trainable, frozen = split(job, job.build(nnx.Rngs(config.seed)))
        held = _by_path(trainable if part == "trainable" else frozen)
        return {name: _cast(variable.get_value(), dtype) for name, (_, variable) in held.items()}

    return jax.jit(arrays, out_shardings=shardings_of(place(mesh, jax.eval_shape(arrays))))()


def _loaded(held: Mapping[str, np.ndarray], variables, dtype: jnp.dtype, mesh: Mesh) -> Arrays:
    for name, array in held.items():
        if name not in variables or variables[name][1].get_value().shape != array.shape:
            raise UserError(f"the weight {name} of shape {array.shape} has no place in this job's model; "
                            "check that the files and the config's sizes belong together")
    return {name: jax.device_put(_cast(array, dtype), sharding.parameter_sharding(mesh, name))
            for name, array in held.items()}


def _cast(array, dtype):
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def place(mesh: Mesh, shapes: Any) -> Any:
    """Shapes with the shardings of trainables, or of an optimizer's state over them."""
    return jax.tree.map(lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
                        shapes, sharding.tree_shardings(mesh, shapes))


def shardings_of(shapes: Any) -> Any:
    return jax.tree.map(lambda shape: shape.sharding, shapes)


def count(arrays: Mapping[str, Any]) -> int:
    """Number of parameters."""
    return sum(array.size for array in arrays.values())


def make_train_step(job: Job, layout: Layout, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """The pure step (trainable, opt_state, frozen, batch, step) -> (trainable, opt_state, metrics).

    `step` is the step's index, uint32; all randomness of a step comes from it and from `seed`.
    """
    def train_step(trainable: Arrays, opt_state: Any, frozen: Arrays, batch: Batch, step: jax.Array):
        key = jax.random.fold_in(jax.random.key(seed), step)

        def loss_of(trainable: Arrays):
            return job.loss(layout.model(trainable, frozen), batch, key)

        (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        return trainable, opt_state, {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradient)}

    return train_step


def next_batch(job: Job, data, mesh: Mesh) -> dict[str, jax.Array]:
    """The next batch on the devices, after the job's `prepare` if it has one; what is no array of numbers is left."""
    batch = next(data)
    if hasattr(job, "prepare"):
        batch = job.prepare(batch)
    return sharding.put_batch(mesh, {name: np.asarray(value) for name, value in batch.items()
                                     if isinstance(value, np.ndarray | jax.Array) and value.dtype.kind not in "OSU"})


class StopRequest:
    """Whether SIGTERM (preemption) has come; the loop then ends after the step it is in."""

    def __init__(self):
        self.requested = False
        self.before = signal.signal(signal.SIGTERM, self._request)

    def _request(self, number, frame) -> None:
        self.requested = True

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self.before)
