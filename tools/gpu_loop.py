"""What the GPU scripts of the small base share: a trainer of many steps a dispatch, ended by the clock, and its log.

Imports jax, flax, optax and numpy alone, and these where they are needed: gpu_base.py and gpu_clip.py run on machines
that have little else.
"""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

PREPARED = Path("local_data/gpu")
DRAWINGS = Path("local_data/drawings64.npz")
# Searching for the fastest products took longer than it saves (they are cuBLAS's).
UNSEARCHED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
DISPATCH = 0.7  # seconds that a dispatch of steps should take


class Settings(dict):
    """A config without ml_collections: fields as attributes and as items."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @classmethod
    def of(cls, value):
        return cls({k: cls.of(v) for k, v in value.items()}) if isinstance(value, dict) else value


class Log:
    """What happens when, on the screen and in OUT/`name`.json, which has a list for each of `curves`."""

    def __init__(self, out: Path, seconds: float, name: str = "base", curves: tuple[str, ...] = ("vae", "transformer")):
        self.file, self.seconds, self.start = out / f"{name}.json", seconds, time.monotonic()
        self.record: dict = {"seconds": seconds, "events": [], **{curve: [] for curve in curves}}
        self.lock = threading.Lock()
        self.written = 0.0

    def now(self) -> float:
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        with self.lock:
            print(f"[{self.now():6.1f}] {text}", flush=True)
            self.record["events"].append([round(self.now(), 1), text])
        self.write()

    def add(self, curve: str, **values) -> None:
        with self.lock:
            self.record[curve].append({"s": round(self.now(), 2)} | {k: float(f"{v:.5g}") for k, v in values.items()})
        if self.now() - self.written > 5:
            self.write()

    def set(self, **values) -> None:
        with self.lock:
            self.record |= values
        self.write()

    def write(self) -> None:
        with self.lock:
            self.written = self.now()
            partial = self.file.with_name(f"{self.file.name}.partial")
            partial.write_text(json.dumps(self.record))
            partial.replace(self.file)


class Background(threading.Thread):
    """A function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.function, self.arguments, self.made, self.error = function, arguments, None, None
        self.start()

    def run(self):
        try:
            self.made = self.function(*self.arguments)
        except BaseException as error:  # handed on by `result`
            self.error = error

    @property
    def done(self) -> bool:
        return not self.is_alive() and self.error is None

    def result(self):
        self.join()
        if self.error:
            raise self.error
        return self.made


def trainer(build, config, loss):
    """A trainer of all weights of the model that `build(rngs)` makes, many steps a dispatch.

    It has `fresh()`, the state to start from, and `lower(*tables)`, which lowers (state, steps, first progress,
    progress a step, scale, *tables) -> (state, {metric: mean}): so many updates in one dispatch.

    loss: (model, key, *tables) -> (loss, metrics). Progress, 0 to 1, is what the learning rate follows; `scale` is a
    factor on it.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lorweb_jax.files.state import flat_state
    from lorweb_jax.nn.layers import Weight
    from lorweb_jax.training.job import Job
    from lorweb_jax.training.optimizer import make_optimizer
    from lorweb_jax.training.state import Partition, new_state
    from lorweb_jax.training.step import make_update

    class TableJob(Job):
        """The tables, all examples there are, are the batch of every step: the loss draws from them."""

        trainable = Weight

        def build(self, rngs):
            return build(rngs)

        def loss(self, model, tables, key):
            return loss(model, key, *tables)

    job = TableJob()
    partition = Partition.of(job, config.seed)

    def fresh():
        weights = flat_state(build(nnx.Rngs(config.seed)))
        return new_state(job, partition, make_optimizer(config, lambda count: 0.0), config, weights, {})

    def chunk(state, steps, first, a_step, scale, *tables):
        def step(i, state):
            progress = first + a_step * i
            warm_up = jnp.minimum(progress / 0.02 + 1e-3, 1.0)
            cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
            rate = scale * config.optimizer.learning_rate * warm_up * cosine
            return make_update(job, partition, make_optimizer(config, lambda _: rate), config)(state, {}, tables)

        def summed(i, carry):
            state, sums = carry
            state, metrics = step(i, state)
            return state, jax.tree.map(lambda total, x: total + x / steps, sums, metrics)

        # A loop of a length that is an argument: the first dispatch may be a single step.
        sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda state: step(0, state)[1], state))
        return jax.lax.fori_loop(0, steps, summed, (state, sums))

    def begun():
        """`fresh`'s arrays, made on the CPU if there is one for jax: it compiles random numbers sooner."""
        try:
            device = jax.devices("cpu")[0]
        except RuntimeError:
            device = jax.devices()[0]
        with jax.default_device(device):
            return jax.device_get(jax.jit(fresh)())

    number, count = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.int32))

    def lower(*tables):
        return jax.jit(chunk, donate_argnums=0).lower(jax.eval_shape(fresh), count, number, number, number, *tables)

    return SimpleNamespace(fresh=begun, lower=lower, partition=partition)


class TooSlow(Exception):
    """A phase that can't make its steps in its time."""


def run_until(deadline: float, log: Log, curve: str, most: int, state, tables, program, every=None, least: int = 0):
    """Dispatches of `program`, of up to `most` steps, until the clock stands at `deadline`; the learning rate reaches
    zero there. The first two are of one step: they load the program and show how long a step takes.

    every: called as every(state, progress) between dispatches; it may return other tables.
    Raises TooSlow, after these two, where fewer than `least` steps fit.
    """
    import jax

    begin, took, done, steps = log.now(), [], 0, 1
    scale, kept, kept_at = 1.0, jax.device_get(state), 0.0
    while True:
        now = log.now()
        a_step = float(np.median(took[-5:])) if took else 0.0
        if now + a_step * steps > deadline and done:
            break
        span = deadline - begin
        progress = (now - begin) / span
        state, metrics = program(
            state, np.int32(steps), np.float32(progress), np.float32(a_step / span), np.float32(scale), *tables
        )
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        first, done = not done, done + steps
        if first:  # it loads the program
            log.say(f"{curve}: the first step took {log.now() - now:.2f} s")
        else:
            took.append(max((log.now() - now) / steps, 1e-6))
        if len(took) == 1:
            log.say(f"{curve}: {1000 * took[0]:.1f} ms a step")
            if done + (deadline - log.now()) / took[0] < least:
                raise TooSlow(f"{curve}: at {took[0]:.2f} s a step fewer than {least} steps fit in {span:.0f} s")
        if took:
            steps = int(np.clip(round(DISPATCH / np.median(took[-5:])), 1, most))
        log.add(curve, step=done, progress=progress, **metrics)
        if not np.isfinite(metrics["loss"]):
            scale /= 2
            log.say(
                f"{curve}: the loss is {metrics['loss']} after {done} steps; on from {kept_at:.2f} at {scale} of the "
                "learning rate"
            )
            if scale < 0.05:
                raise FloatingPointError(f"{curve}: the loss is {metrics['loss']} after {done} steps")
            state = kept
        elif progress > kept_at + 0.1:
            kept, kept_at = jax.device_get(state), progress
        if every and (other := every(state, progress)) is not None:
            tables = other
    log.say(f"{curve}: {done} steps, {1000 * float(np.median(took or [0])):.1f} ms a step")
    return state


def save(path: Path, weights, dtype) -> None:
    from lorweb_jax.files.safetensors_io import write

    write(path, {name: np.asarray(array).astype(dtype) for name, array in weights.items()})
