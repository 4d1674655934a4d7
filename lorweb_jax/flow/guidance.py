"""Style guidance: how the velocities of one step's passes become one (method.md §7; Pair Customization, Eq. 11)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StyleGuidance:
    """v0(∅) + cfg · (v0(c) − v0(∅)) + Σ_j strength_j · (v_j(c_j) − v0(c)), of 2 + S passes in this order:

    the base with the prompt c, the base with the negative prompt ∅, then each style by itself with its own prompt c_j.
    Strengths may be negative; where all are 0, the result is that of classifier-free guidance to the bit.

    cfg: scale of classifier-free guidance; None where there is none, v0(c) + Σ_j …, of 1 + S passes without the
    negative prompt's. strengths: [S].
    """

    cfg: float | jax.Array | None
    strengths: jax.Array

    @classmethod
    def of(cls, cfg: float | None, strengths: Sequence[float]) -> "StyleGuidance":
        return cls(None if cfg is None else jnp.float32(cfg), jnp.asarray(strengths, jnp.float32))

    @property
    def passes(self) -> int:
        return (1 if self.cfg is None else 2) + self.strengths.shape[0]

    def __call__(self, velocity_pbsc: jax.Array) -> jax.Array:
        if self.cfg is None:
            prompt, *styles = velocity_pbsc
            velocity = prompt
        else:
            prompt, negative, *styles = velocity_pbsc
            velocity = negative + self.cfg * (prompt - negative)
        for strength, style in zip(self.strengths, styles, strict=True):
            velocity = velocity + strength * (style - prompt)
        return velocity
