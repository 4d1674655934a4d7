"""A mix folded into the weights: W + scale · Σ_n c_n A_n B_n (method.md §3); a step then costs what the base costs."""

import operator

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.adapters.mixture import LowRankAdapter
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn import sharding
from lorweb_jax.nn.layers import Linear, Scale, Unstacked
from lorweb_jax.nn.offload import any_offloaded


def can_fold(module: nnx.Module) -> bool:
    """Whether the module's linear layers can take an update: none of them is quantised, or in the host's memory."""
    return not (jax.tree.leaves(nnx.state(module, Scale)) or any_offloaded(nnx.state(module)))


def layers_at(module: nnx.Module, path: str) -> list[Linear]:
    """The one layer, or stack of layers, at a dotted path; of an Unstacked, each block's layer."""
    layers = [module]
    for name in path.split("."):
        if isinstance(layers[0], Unstacked) and not hasattr(layers[0], name):
            layers = list(layers[0].blocks)
        layers = [getattr(each, name) for each in layers]
    return layers


def fold(module: nnx.Module, mixes: dict[str, LowRankAdapter]) -> nnx.Module:
    """A module whose linear layers, by path, have the updates added to their kernels; all else is `module`'s own.

    Every mix must be of one example (coeff [l, 1, n]), l = 1 for a layer outside the stacks, whose kernel is [i, o].
    Kernels keep their dtype; the sum is computed in float32, one layer at a time, so that beside the new kernels a
    single layer's update is held. Raises UserError for 8-bit kernels, whose codes are coarser than the update, and for
    kernels in the host's memory: see `can_fold`.
    """
    if any_offloaded(nnx.state(module)):
        raise UserError(
            "the base's blocks are in the host's memory, where nothing is folded into them; leave folding out, or load "
            "the base without offload",
            2,
        )
    if not can_fold(module):
        raise UserError(
            "the base is quantised to 8 bit, and a mix can't be folded into such kernels: rounding would "
            "swallow it; leave folding out, or load the base without quantisation",
            2,
        )
    graphdef, state = nnx.split(module)
    folded = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    for path, mix in mixes.items():
        layers = layers_at(folded, path)
        depths = [slice(None)] if len(layers) == 1 else [slice(i, i + 1) for i in range(len(layers))]
        mixes_of = [jax.tree.map(operator.itemgetter(depth), mix) for depth in depths]
        for layer, own in zip(layers, mixes_of, strict=True):
            kernel = layer.kernel[...]
            kernel_lio = kernel.reshape(-1, *kernel.shape[-2:])
            layer.kernel.set_value(sharding.put_beside(_updated(kernel_lio, own).reshape(kernel.shape), kernel))
    return folded


@jax.jit
def _updated(kernel_lio: jax.Array, mix: LowRankAdapter) -> jax.Array:
    def one_layer(layer):
        kernel_io, mix = layer
        [c] = mix.scale * mix.coeff_bn
        a, b = mix.a_nir.astype(jnp.float32), mix.b_nro.astype(jnp.float32)
        update_io = jnp.einsum("nir,nro->io", a * c[:, None, None], b)
        return (kernel_io.astype(jnp.float32) + update_io).astype(kernel_io.dtype)

    return jax.lax.map(one_layer, (kernel_lio, mix))
