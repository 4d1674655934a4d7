"""Euler steps along the velocity from noise to an image's latents, and how several velocities become one."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, Any], jax.Array]


class Combine(Protocol):
    """Makes one velocity out of those of several passes; a pytree, so that a jitted sampler takes new weights without
    compiling again."""

    passes: ClassVar[int]

    def __call__(self, velocity_pbsc: jax.Array) -> jax.Array:
        """[p, b, s, c] -> [b, s, c], p = passes."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Single:
    """One pass, whose velocity is taken as it is."""

    passes: ClassVar[int] = 1

    def __call__(self, velocity_pbsc: jax.Array) -> jax.Array:
        return velocity_pbsc[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrueGuidance:
    """Classifier-free guidance, v(∅) + scale · (v(c) − v(∅)), of two passes: c the prompt, ∅ the negative prompt."""

    passes: ClassVar[int] = 2
    scale: float | jax.Array

    def __call__(self, velocity_pbsc: jax.Array) -> jax.Array:
        prompt, negative = velocity_pbsc
        return negative + self.scale * (prompt - negative)


SINGLE = Single()


def euler(
    velocity: Velocity, noise_bsc: jax.Array, sigmas: jax.Array, inputs: Any = None, combine: Combine = SINGLE
) -> jax.Array:
    """z ← z + (σ' − σ) · v over consecutive noise levels, as one scanned loop; z stays float32.

    velocity: (rows [p·b, s, c], level of each row [p·b]) -> [p·b, s, c]. It sees all p passes of `combine` as rows of
    one batch: those of the first pass, then those of the second, and so on, each of the same z. What differs from pass
    to pass, such as the text, is the velocity's own affair.
    sigmas: [steps + 1], descending. inputs: a tree of arrays [steps, …] that were computed from the levels beforehand;
    velocity then gets each step's part in the place of the level.

    Ranges of levels compose: passes that only some steps need are a second call from where the first one ended.
    """
    sigmas = jnp.asarray(sigmas)
    if inputs is None:
        inputs = sigmas[:-1]

        def by_level(rows, sigma):
            return velocity(rows, jnp.broadcast_to(sigma, rows.shape[:1]))
    else:
        by_level = velocity

    def step(z, now):
        difference, of_step = now
        return euler_step(by_level, z, difference, of_step, combine), None

    return jax.lax.scan(step, noise_bsc.astype(jnp.float32), (jnp.diff(sigmas), inputs))[0]


def euler_step(
    velocity: Velocity, z_bsc: jax.Array, difference: jax.Array, inputs: Any, combine: Combine = SINGLE
) -> jax.Array:
    """One step of `euler`, for the difference σ' − σ of its two levels and the velocity's `inputs` at this step."""
    rows = jnp.tile(z_bsc, (combine.passes, 1, 1))
    with jax.named_scope("sampling_step"):
        v = velocity(rows, inputs).reshape(combine.passes, *z_bsc.shape)
        return z_bsc + difference * combine(v).astype(z_bsc.dtype)
