"""One analogy's mix folded into the weights: W + scale · Σ_n c_n A_n B_n; a step then costs what the base's does."""

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.adapters.mixture import LowRankMix
from lorweb_jax.common.errors import UserError
from lorweb_jax.nn.layers import Scale


def weight_update(mix: LowRankMix) -> jax.Array:
    """scale · Σ_n c_n A_n B_n in float32, [l, i, o], for a stack's mix of one example (coeff [l, 1, n])."""
    l, n, i, r = mix.a_nir.shape
    coeff_ln = mix.scale * mix.coeff_bn.reshape(l, n)
    a = (mix.a_nir * coeff_ln[:, :, None, None]).astype(jnp.float32).transpose(0, 2, 1, 3).reshape(l, i, n * r)
    return a @ mix.b_nro.astype(jnp.float32).reshape(l, n * r, -1)


def can_fold(module: nnx.Module) -> bool:
    """Whether the module's linear layers can take an update: none of them is quantised."""
    return not jax.tree.leaves(nnx.state(module, Scale))


def fold(module: nnx.Module, mixes: dict[str, LowRankMix]) -> nnx.Module:
    """A copy of `module` whose linear layers, found by path, have the updates added to their kernels.

    Every mix must hold one example (b = 1). Kernels keep their dtype; the sum is made in float32. Raises UserError for
    8-bit kernels, whose codes are coarser than the update: see `can_fold`.
    """
    if not can_fold(module):
        raise UserError(
            "the base is quantised to 8 bit, and a mix can't be folded into such kernels: rounding would "
            "swallow it; leave folding out, or load the base without quantisation",
            2,
        )
    graphdef, state = nnx.split(module)
    folded = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    for path, mix in mixes.items():
        layer = folded
        for name in path.split("."):
            layer = getattr(layer, name)
        kernel = layer.kernel[...]
        layer.kernel.set_value((kernel.astype(jnp.float32) + weight_update(mix)).astype(kernel.dtype))
    return folded
