"""Random transformers, bases and inputs, each array made on the device in the dtype it is kept in.

No array is ever whole in float32: of a stack, one layer at a time is made and, where it is to be, quantised. A
transformer of 12 B parameters in bfloat16 takes 24 GB and little more while it is made.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmark.setting import Setting
from lorweb_jax.adapters.basis import Basis
from lorweb_jax.files.state import build, shapes
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.nn.quantization import quantize

_SMALL = 2**22  # numbers; numpy has nothing to compile for each shape


def normal(seed: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> jax.Array:
    """Random numbers of mean 0 and deviation `scale`."""
    if math.prod(shape) < _SMALL:
        values = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
        return jnp.asarray(values.astype(jnp.dtype(dtype)))
    return _on_device(_key(seed), shape, dtype, scale)


def quantised(seed: int, shape: tuple[int, ...], dtype: str, kind: str) -> tuple[jax.Array, jax.Array]:
    """(codes [l, i, o], scale [l, 1, o]) of random kernels of deviation 1/√i."""
    return _quantised_on_device(_key(seed), shape, dtype, kind)


def _key(seed: int) -> jax.Array:
    return jax.random.key(seed, impl="unsafe_rbg")


def _by_layer(make: Callable[[jax.Array, tuple[int, ...]], jax.Array], key: jax.Array, shape: tuple[int, ...]):
    """`make(key, shape)` of every part along the first axis, one after the other."""
    if len(shape) < 3:
        return make(key, shape)
    return jax.lax.map(lambda key: make(key, shape[1:]), jax.random.split(key, shape[0]))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _on_device(key, shape, dtype, scale):
    return _by_layer(lambda key, shape: jax.random.normal(key, shape, dtype) * scale, key, shape)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantised_on_device(key, shape, dtype, kind):
    return _by_layer(
        lambda key, shape: quantize(jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5, kind), key, shape
    )


def new_flux(setting: Setting) -> Flux:
    """The transformer as the setting has it, fresh; its stacks are stacked."""
    return Flux(
        setting.model,
        remat=setting.remat,
        attention=setting.attention,
        unroll=setting.unroll,
        quantization=setting.quantization,
        rngs=nnx.Rngs(0),
    )


def random_flux(setting: Setting) -> Flux:
    """The transformer with random weights in the setting's dtype, linear layers of the blocks perhaps in 8 bit.

    Nothing is left at zero, as a fresh model has it: products of zeros can run faster than real ones.
    """
    make = functools.partial(new_flux, setting)
    held, flat = shapes(make), {}
    # The largest first, while there is most room for what its making needs.
    for seed, (path, leaf) in enumerate(sorted(held.items(), key=lambda item: -item[1].size)):
        name = path.removesuffix(".kernel")
        if path.endswith(".kernel") and f"{name}.scale" in held:
            flat[path], flat[f"{name}.scale"] = quantised(seed, leaf.shape, setting.dtype, setting.quantization)
        elif path.endswith(".scale"):
            # Of a normalisation; a quantised layer's came with its codes.
            flat.setdefault(path, jnp.ones(leaf.shape, setting.dtype))
        else:
            flat[path] = normal(
                seed, leaf.shape, setting.dtype, 0.02 if path.endswith(".bias") else leaf.shape[-2] ** -0.5
            )
    flux = build(make, flat)
    if setting.unstacked:
        flux.unstack()
    return flux


def random_basis(setting: Setting, dtype: str) -> Basis:
    """A basis over all linear layers of the blocks, B not zero."""
    config = setting.basis
    n, r, k, q = config.size, config.rank, config.key_dim, config.query_dim
    arrays, seeds = {}, itertools.count()
    for path, layer in setting.backbone.adapted.items():
        l, i, o = layer.depth, layer.inputs, layer.outputs
        arrays[path] = {
            "a": normal(next(seeds), (l, n, i, r), dtype, i**-0.5),
            "b": normal(next(seeds), (l, n, r, o), dtype, 0.02),
            "keys": normal(next(seeds), (l, n, k), dtype),
            "projection": normal(next(seeds), (l, k, q), dtype, q**-0.5),
        }
    return Basis.from_arrays(config, arrays)


def inputs(setting: Setting) -> dict[str, jax.Array]:
    """Random arguments of Flux, by name, a target for its velocity and a query for the router."""
    model, b, s, t = setting.model, setting.batch, setting.tokens, setting.text_tokens
    index = np.arange(s // 2)
    width = max(1, math.isqrt(s // 2))
    ids = [np.stack([np.full_like(index, image), index // width, index % width], -1) for image in (0, 1)]
    return {
        "hidden_bsc": normal(0, (b, s, model.in_channels), setting.dtype),
        "text_btj": normal(1, (b, t, model.joint_attention_dim), setting.dtype),
        "pooled_bp": normal(2, (b, model.pooled_projection_dim), setting.dtype),
        "timestep_b": jnp.linspace(0.3, 0.7, b),
        "guidance_b": jnp.full((b,), 2.5),
        "image_ids_s3": jnp.asarray(np.concatenate(ids), jnp.float32),
        "text_ids_t3": jnp.zeros((t, 3)),
        "target": normal(3, (b, s // 2, model.in_channels), "float32"),
        "query": normal(4, (b, setting.basis.query_dim), "float32"),
    }
