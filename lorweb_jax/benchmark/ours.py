"""The rows measured in JAX: steps of this project's transformer on random weights made on the device."""

import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorweb_jax.basis.basis import Basis, BasisParam
from lorweb_jax.basis.fold import fold
from lorweb_jax.benchmark.setting import Setting
from lorweb_jax.flow.loss import weighted_mse
from lorweb_jax.transformer.flux import Flux, block_linears
from lorweb_jax.weights.state import build, shapes


class Step(NamedTuple):
    """Something to time: `run(count)` does so many steps and returns when the last is done."""

    run: Callable[[int], None]
    compile_seconds: float
    note: str = ""


def normal(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Random numbers of mean 0 and deviation `scale`."""
    if math.prod(shape) < 2 ** 22:
        # Numpy has nothing to compile for each shape.
        values = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
        return jnp.asarray(values.astype(jnp.dtype(dtype)))
    return _normal_on_device(jax.random.key(seed, impl="unsafe_rbg"), shape, dtype, scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal_on_device(key: jax.Array, shape: tuple[int, ...], dtype: str, scale: float) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * scale


def random_flux(setting: Setting) -> Flux:
    """The transformer with random weights, each made on the device in the setting's dtype.

    Nothing is left at zero, as a fresh model has it: products of zeros can run faster than real ones.
    """
    def make():
        return Flux(setting.model, remat=setting.remat, attention=setting.attention, unroll=setting.unroll,
                    rngs=nnx.Rngs(0))

    def weight(seed, path, shape):
        if path.endswith(".scale"):
            return jnp.ones(shape, setting.dtype)
        return normal(seed, shape, setting.dtype, 0.02 if path.endswith(".bias") else shape[-2] ** -0.5)

    # The largest first, while there is most room for what its making needs.
    found = sorted(shapes(make).items(), key=lambda item: -item[1].size)
    return build(make, {path: weight(seed, path, leaf.shape) for seed, (path, leaf) in enumerate(found)})


def random_basis(setting: Setting, dtype: str) -> Basis:
    """A basis over all linear layers of the blocks, B not zero."""
    config = setting.basis
    n, r, k, q = config.size, config.rank, config.key_dim, config.query_dim
    arrays, seeds = {}, itertools.count()
    for path, (l, i, o) in block_linears(setting.model).items():
        arrays[path] = {"a": normal(next(seeds), (l, n, i, r), dtype, i ** -0.5),
                        "b": normal(next(seeds), (l, n, r, o), dtype, 0.02),
                        "keys": normal(next(seeds), (l, n, k), dtype),
                        "projection": normal(next(seeds), (l, k, q), dtype, q ** -0.5)}
    return Basis.from_arrays(config, arrays)


def inputs(setting: Setting) -> dict[str, jax.Array]:
    """Random arguments of Flux, by name, a target for its velocity and a query for the router."""
    model, b, s, t = setting.model, setting.batch, setting.tokens, setting.text_tokens
    index = np.arange(s // 2)
    width = max(1, math.isqrt(s // 2))
    ids = [np.stack([np.full_like(index, image), index // width, index % width], -1) for image in (0, 1)]
    return {"hidden_bsc": normal(0, (b, s, model.in_channels), setting.dtype),
            "text_btj": normal(1, (b, t, model.joint_attention_dim), setting.dtype),
            "pooled_bp": normal(2, (b, model.pooled_projection_dim), setting.dtype),
            "timestep_b": jnp.linspace(0.3, 0.7, b), "guidance_b": jnp.full((b,), 2.5),
            "image_ids_s3": jnp.asarray(np.concatenate(ids), jnp.float32), "text_ids_t3": jnp.zeros((t, 3)),
            "target": normal(3, (b, s // 2, model.in_channels), "float32"),
            "query": normal(4, (b, setting.basis.query_dim), "float32")}


def loss(flux: Flux, given: dict[str, jax.Array], additions: Any = None) -> jax.Array:
    """Mean squared error of the noisy tokens' velocity."""
    arguments = {name: value for name, value in given.items() if name not in ("target", "query")}
    velocity = flux(**arguments, additions=additions)
    target = given["target"]
    return weighted_mse(velocity[:, :target.shape[1]], target, jnp.ones(target.shape[0]))[0]


def compiled(function: Callable, *args, donate: tuple[int, ...] = ()) -> tuple[Callable, float]:
    """(`function` compiled for these arguments, seconds that took)."""
    start = time.perf_counter()
    return jax.jit(function, donate_argnums=donate).lower(*args).compile(), time.perf_counter() - start


def repeated(function: Callable, *args) -> Callable[[int], None]:
    def run(count):
        for _ in range(count):
            out = function(*args)
        jax.block_until_ready(out)

    return run


def sample_step(row: str, setting: Setting) -> Step:
    """A forward: "base", or with one analogy's mix, beside the weights ("low-rank") or in them ("folded").

    Coefficients are computed beforehand, as when sampling.
    """
    given = inputs(setting)
    query = given.pop("query")
    given.pop("target")
    flux, additions, note = random_flux(setting), None, ""
    if row != "base":
        basis = random_basis(setting, setting.dtype)
        additions = basis.additions(nnx.jit(lambda basis, query: basis.coefficients(query))(basis, query))
        del basis
    graphdef, state = nnx.split(flux)
    del flux
    if row == "folded":
        additions = {path: type(mix)(mix.a_nir, mix.b_nro, mix.coeff_bn[:, :1], mix.scale)
                     for path, mix in additions.items()}
        # The old weights are given away, so that the two never stand side by side at full size.
        folding, _ = compiled(lambda state, mixes: nnx.state(fold(nnx.merge(graphdef, state), mixes)),
                              state, additions, donate=(0,))
        start = time.perf_counter()
        state = jax.block_until_ready(folding(state, additions))
        note, additions = f"folding took {time.perf_counter() - start:.2f} s, once an analogy", None

    def forward(state, given, additions):
        return nnx.merge(graphdef, state)(**given, additions=additions)

    function, seconds = compiled(forward, state, given, additions)
    return Step(repeated(function, state, given, additions), seconds, note)


def gradients(row: str, graphdef: nnx.GraphDef) -> Callable:
    """(state, given) -> the loss and its gradient with respect to all "weights", or to the tokens of the "inputs"."""
    def of_weights(state, given):
        return jax.value_and_grad(lambda state: loss(nnx.merge(graphdef, state), given))(state)

    def of_inputs(state, given):
        tokens = {name: given[name] for name in ("hidden_bsc", "text_btj")}
        return jax.value_and_grad(lambda tokens: loss(nnx.merge(graphdef, state), given | tokens))(tokens)

    return {"weights": of_weights, "inputs": of_inputs}[row]


def gradient_step(row: str, setting: Setting) -> Step:
    """Forward and backward of the plain transformer, see `gradients`."""
    given = inputs(setting)
    graphdef, state = nnx.split(random_flux(setting))
    function, seconds = compiled(gradients(row, graphdef), state, given)
    return Step(repeated(function, state, given), seconds)


def train_step(graphdef: nnx.GraphDef, basisdef: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """(trainable, opt_state, state, given) -> (trainable, opt_state, loss): the basis trained over a frozen base."""
    def step(trainable, opt_state, state, given):
        def loss_of(trainable):
            basis = nnx.merge(basisdef, trainable)
            return loss(nnx.merge(graphdef, state), given, basis.additions(basis.coefficients(given["query"])))

        value, gradient = jax.value_and_grad(loss_of)(trainable)
        updates, opt_state = optimizer.update(gradient, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, value

    return step


# The paper's recipe (method.md §5).
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.99, weight_decay=0.05))


def basis_step(setting: Setting) -> Step:
    """A training step of a float32 basis: router, forward, backward, clip, AdamW."""
    given = inputs(setting)
    graphdef, state = nnx.split(random_flux(setting))
    basisdef, trainable = nnx.split(random_basis(setting, "float32"), BasisParam)
    opt_state = jax.jit(OPTIMIZER.init)(trainable)
    function, seconds = compiled(train_step(graphdef, basisdef, OPTIMIZER), trainable, opt_state, state, given,
                                 donate=(0, 1))

    def run(count):
        nonlocal trainable, opt_state
        for _ in range(count):
            trainable, opt_state, value = function(trainable, opt_state, state, given)
        jax.block_until_ready((value, trainable))

    return Step(run, seconds)


def make_step(row: str, setting: Setting) -> Step:
    if row in ("base", "low-rank", "folded"):
        return sample_step(row, setting)
    return basis_step(setting) if row == "basis" else gradient_step(row, setting)
