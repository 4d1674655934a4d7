"""The rows measured in JAX: steps of this project's transformer on random weights."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmark.random_weights import inputs, random_basis, random_flux
from benchmark.setting import Setting
from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.adapters.fold import fold
from lorweb_jax.flow.loss import weighted_mse
from lorweb_jax.nn.quantization import bytes_by_dtype
from lorweb_jax.training.optimizer import make_optimizer

Arrays = dict[str, jax.Array]
SAMPLING_STEPS = 28  # of an edit at full size; as many modulations are made in one product


class Step(NamedTuple):
    """Something to time: `run(count)` does so many steps and returns when the last is done. `weight_bytes` are those
    of the frozen transformer, `temporary_bytes` what the compiler sets aside beside arguments and results."""

    run: Callable[[int], None]
    compile_seconds: float
    weight_bytes: int | None = None
    temporary_bytes: int | None = None
    note: str = ""


def compiled(function: Callable, *args, donate: tuple[int, ...] = ()) -> tuple[Callable, float]:
    """(`function` compiled for these arguments, seconds that took)."""
    start = time.perf_counter()
    return jax.jit(function, donate_argnums=donate).lower(*args).compile(), time.perf_counter() - start


def timed(function: Callable, *args) -> tuple[Any, float]:
    start = time.perf_counter()
    return jax.block_until_ready(function(*args)), time.perf_counter() - start


def describe(state: Any, function: Callable) -> dict[str, Any]:
    """The Step's facts about weights and memory."""
    analysis = function.memory_analysis()
    return {
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "temporary_bytes": analysis.temp_size_in_bytes if analysis else None,
    }


def repeated(function: Callable, *args) -> Callable[[int], None]:
    def run(count):
        for _ in range(count):
            out = function(*args)
        jax.block_until_ready(out)

    return run


def sample_step(kind: str, setting: Setting) -> Step:
    """A step of sampling: "base", with one analogy's mix beside the weights ("low-rank") or in them ("folded").

    Coefficients and modulations are computed beforehand, as model.sample does; "inside" computes modulations anew.
    """
    given = inputs(setting)
    query = given.pop("query")
    given.pop("target")
    flux, adapters, notes = random_flux(setting), None, []
    if kind in ("low-rank", "folded"):
        basis = random_basis(setting, setting.dtype)
        adapters = basis.adapters(nnx.jit(lambda basis, query: basis.coefficients(query))(basis, query))
        del basis
    graphdef, state = nnx.split(flux)
    del flux
    if kind == "folded":
        adapters = {
            path: type(mix)(mix.a_nir, mix.b_nro, mix.coeff_bn[:, :1], mix.scale) for path, mix in adapters.items()
        }
        # The old weights are given away, so that the two never stand side by side at full size.
        folding, _ = compiled(
            lambda state, mixes: nnx.state(fold(nnx.merge(graphdef, state), mixes)), state, adapters, donate=(0,)
        )
        state, seconds = timed(folding, state, adapters)
        notes.append(f"folding took {seconds:.2f} s, once an analogy")
        adapters = None

    levels = {name: given.pop(name) for name in ("pooled_bp", "timestep_b", "guidance_b")}
    if kind == "inside":
        function, seconds = compiled(step_with_modulations(graphdef), state, given, levels, adapters)
        run = repeated(function, state, given, levels, adapters)
    else:
        all_steps, _ = compiled(modulations_ahead(graphdef), state, levels, adapters)
        all_steps(state, levels, adapters)
        made, took = timed(all_steps, state, levels, adapters)
        notes.append(
            f"modulations of {SAMPLING_STEPS} steps made beforehand in {1e3 * took:.3g} ms, "
            f"{1e3 * took / SAMPLING_STEPS:.3g} ms a step"
        )
        modulations = jax.tree.map(lambda x: x[0], made)
        function, seconds = compiled(step_without_modulations(graphdef), state, given, modulations, adapters)
        run = repeated(function, state, given, modulations, adapters)
    if setting.quantization != "none":
        notes.append(f"holds {bytes_by_dtype(state)}")
    return Step(run, seconds, **describe(state, function), note="; ".join(notes))


def modulations_ahead(graphdef: nnx.GraphDef) -> Callable:
    """(state, levels, adapters) -> flux.Modulations of all steps, with a leading axis."""

    def ahead(state, levels, adapters):
        flux = nnx.merge(graphdef, state)

        def of(sigma):
            time_b = jnp.broadcast_to(sigma, levels["timestep_b"].shape)
            return flux.modulations(levels["pooled_bp"], time_b, levels["guidance_b"], adapters)

        return jax.vmap(of)(jnp.linspace(1.0, 1 / SAMPLING_STEPS, SAMPLING_STEPS))

    return ahead


def step_without_modulations(graphdef: nnx.GraphDef) -> Callable:
    def step(state, given, modulations, adapters):
        return nnx.merge(graphdef, state).velocity(**given, modulations=modulations, adapters=adapters)

    return step


def step_with_modulations(graphdef: nnx.GraphDef) -> Callable:
    return lambda state, given, levels, adapters: nnx.merge(graphdef, state)(**given, **levels, adapters=adapters)


def loss(flux: nnx.Module, given: Arrays, adapters: Any = None) -> jax.Array:
    """Mean squared error of the noisy tokens' velocity."""
    arguments = {name: value for name, value in given.items() if name not in ("target", "query")}
    velocity = flux(**arguments, adapters=adapters)
    target = given["target"]
    return weighted_mse(velocity[:, : target.shape[1]], target, jnp.ones(target.shape[0]))[0]


def gradients(kind: str, graphdef: nnx.GraphDef) -> Callable:
    """(state, given) -> the loss and its gradient with respect to all "weights", or to the tokens of the "inputs"."""

    def of_weights(state, given):
        return jax.value_and_grad(lambda state: loss(nnx.merge(graphdef, state), given))(state)

    def of_inputs(state, given):
        tokens = {name: given[name] for name in ("hidden_bsc", "text_btj")}
        return jax.value_and_grad(lambda tokens: loss(nnx.merge(graphdef, state), given | tokens))(tokens)

    return {"weights": of_weights, "inputs": of_inputs}[kind]


def gradient_step(kind: str, setting: Setting) -> Step:
    """Forward and backward of the plain transformer, see `gradients`."""
    given = inputs(setting)
    graphdef, state = nnx.split(random_flux(setting))
    function, seconds = compiled(gradients(kind, graphdef), state, given)
    return Step(repeated(function, state, given), seconds, **describe(state, function))


def train_step(graphdef: nnx.GraphDef, config: BasisConfig, optimizer: optax.GradientTransformation) -> Callable:
    """(trainable, opt_state, state, given) -> (trainable, opt_state, loss): the basis trained over a frozen base.

    trainable: {path of `flat`: array}."""

    def step(trainable, opt_state, state, given):
        def loss_of(trainable):
            basis = unflat(config, trainable)
            return loss(nnx.merge(graphdef, state), given, basis.adapters(basis.coefficients(given["query"])))

        value, gradient = jax.value_and_grad(loss_of)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


def flat(basis: Basis) -> Arrays:
    """{"<layer's path>.<a, b, keys or projection>": array}"""
    return {f"{path}.{name}": array for path, parts in basis.to_arrays().items() for name, array in parts.items()}


def unflat(config: BasisConfig, arrays: Arrays) -> Basis:
    nested: dict[str, Arrays] = {}
    for path, array in arrays.items():
        layer, _, name = path.rpartition(".")
        nested.setdefault(layer, {})[name] = array
    return Basis.from_arrays(config, nested)


def paper_optimizer(moments: str) -> optax.GradientTransformation:
    """Clipping and AdamW as in the paper's recipe (method.md §5), moments kept as training can keep them."""
    recipe = SimpleNamespace(
        name="adamw",
        learning_rate=1e-3,
        schedule="constant",
        warmup=0,
        clip=1.0,
        b1=0.9,
        b2=0.99,
        weight_decay=0.05,
        moments=moments,
    )
    return make_optimizer(SimpleNamespace(seed=0, train=SimpleNamespace(steps=10_000, ema=0.0), optimizer=recipe))


def basis_step(setting: Setting) -> Step:
    """A training step of a float32 basis: router, forward, backward, clip, AdamW."""
    given = inputs(setting)
    graphdef, state = nnx.split(random_flux(setting))
    trainable = flat(random_basis(setting, "float32"))
    optimizer = paper_optimizer(setting.moments)
    opt_state = jax.jit(optimizer.init)(trainable)
    count = sum(array.size for array in trainable.values())
    notes = [f"{count:,} trainables, optimizer {bytes_by_dtype(opt_state)}"]
    if setting.quantization != "none":
        notes.append(f"frozen weights {bytes_by_dtype(state)}")
    function, seconds = compiled(
        train_step(graphdef, setting.basis, optimizer), trainable, opt_state, state, given, donate=(0, 1)
    )
    facts = describe(state, function)

    def run(count):
        nonlocal trainable, opt_state
        for _ in range(count):
            trainable, opt_state, value = function(trainable, opt_state, state, given)
        jax.block_until_ready((value, trainable))

    return Step(run, seconds, **facts, note="; ".join(notes))


def make_step(kind: str, setting: Setting) -> Step:
    if setting.what == "sample":
        return sample_step(kind, setting)
    return basis_step(setting) if kind == "basis" else gradient_step(kind, setting)
