"""Which passes of the transformer each step of a sampling needs: stages of steps that need the same ones."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from lorweb_jax.flow.guidance import StyleGuidance
from lorweb_jax.flow.sampling import SINGLE, Combine, TrueGuidance
from lorweb_jax.pipeline.request import Request, Sampling

# What a pass shows: the base with the prompt or with the negative prompt; a style is its place among the styles.
PROMPT, NEGATIVE = "prompt", "negative"
Pass = str | int


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps first..end − 1, counted from 0: their passes, in the order of the rows of a batch, and what makes one
    velocity of theirs."""

    first: int
    end: int
    passes: tuple[Pass, ...]
    combine: Combine


def stages(sampling: Sampling, strengths: Sequence[float] = ()) -> list[Stage]:
    """The stages of a sampling, with styles of these strengths: no pass is run whose weight is zero.

    So there is one pass a step where true guidance is 1 or 0 or hasn't begun, two where it has, and to these comes one
    for each style whose strength isn't 0, once the styles have begun, and the prompt's where it is missing.
    """
    steps, scale = sampling.steps, sampling.true_guidance
    style_start = steps // 5 if sampling.style_start is None else sampling.style_start
    styles = [number for number, strength in enumerate(strengths) if strength]
    cuts = {0, steps} | ({sampling.true_guidance_start} if scale != 1 else set()) | ({style_start} if styles else set())
    return [
        Stage(
            first,
            end,
            *_passes(
                scale if first >= sampling.true_guidance_start else 1,
                {number: strengths[number] for number in styles if first >= style_start},
            ),
        )
        for first, end in itertools.pairwise(sorted(cuts))
    ]


def _passes(scale: float, strengths: dict[int, float]) -> tuple[tuple[Pass, ...], Combine]:
    if strengths:
        negative = () if scale == 1 else (NEGATIVE,)
        guidance = StyleGuidance.of(None if scale == 1 else scale, list(strengths.values()))
        return (PROMPT, *negative, *strengths), guidance
    if scale in (0, 1):
        return (PROMPT if scale else NEGATIVE,), SINGLE
    return (PROMPT, NEGATIVE), TrueGuidance(np.float32(scale))


def texts(request: Request, words: Sequence[str], shown: Pass) -> list[str]:
    """The texts of a pass, one for each row of the request. words: of each style, which follow the prompt."""
    if shown == PROMPT:
        return request.prompts
    if shown == NEGATIVE:
        return [request.sampling.negative_prompt or ""] * len(request.prompts)
    return [" ".join(filter(None, (prompt, words[shown]))) for prompt in request.prompts]
