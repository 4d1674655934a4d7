"""External queries of the router: what a frozen image encoder says about an analogy (LoRWeB section 3; method.md §4).

A query is made of views of the condition grid [a, a'; b, b], each seen by the encoder through its own processor.
Grids are cut at half their width and half their height. (The published code cuts non-square grids with one side
length for both axes, so non-square queries differ from its.)

Patch modes. The published ones hand the router a sequence of tokens and crash. Here each view and each depth gives
the mean over its patch tokens (with CLS where the encoder has one), and these means are concatenated: the same
tokens, at q = views · depths · width, where flattening all tokens would take 17 G parameters of projections for
CLIP ViT-L/14. `patch_tokens` gives the tokens themselves.

Modes whose views are the images a, a', b are composed of one embedding an image (`embed`, `compose`), which can be
computed beforehand. The others see whole grids, of which there are about as many as pairs of images: they can't.

Letters: b batch, v views, s patch tokens, d encoder width, p embedding width, e width of what
one view gives, q query width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.images.grid import quadrants


class ImageEncoderModel(Protocol):
    """ClipVision, SiglipVision."""

    @property
    def embedding_width(self) -> int: ...
    @property
    def patch_width(self) -> int: ...

    def __call__(self, pixels: jax.Array) -> jax.Array: ...

    def hidden_states(self, pixels: jax.Array) -> tuple[jax.Array, ...]: ...


def _quadrants(grid: np.ndarray) -> list[np.ndarray]:
    return list(quadrants(grid)[:3])


def _whole(grid: np.ndarray) -> list[np.ndarray]:
    return [grid]


def _without_result(grid: np.ndarray) -> list[np.ndarray]:
    black = grid.copy()
    black[grid.shape[0] // 2 :, grid.shape[1] // 2 :] = 0
    return [black]


def _top_half(grid: np.ndarray) -> list[np.ndarray]:
    return [grid[: grid.shape[0] // 2]]


@dataclass(frozen=True)
class QueryMode:
    """`views` cuts a grid; `weights` [outputs][v] combine the views' embeddings (None: all side by side);
    `depths` counts hidden states from the end (None: the projected embedding)."""

    views: Callable[[np.ndarray], list[np.ndarray]]
    view_count: int
    weights: tuple[tuple[int, ...], ...] | None = None
    depths: tuple[int, ...] | None = None

    @property
    def per_image(self) -> bool:
        """Whether the views are the images a, a', b, so that embeddings of images make any query."""
        return self.views is _quadrants


_LAST, _THREE = (1,), (16, 8, 1)
QUERY_MODES: dict[str, QueryMode] = {
    "cat-aa'b": QueryMode(_quadrants, 3),
    "ca'-ca": QueryMode(_quadrants, 3, ((-1, 1, 0),)),
    "ca'-ca+cb": QueryMode(_quadrants, 3, ((-1, 1, 1),)),
    "aa'bb'": QueryMode(_whole, 1),
    "caa'bb'": QueryMode(_whole, 1),
    "caa'b": QueryMode(_without_result, 1),
    "caa'": QueryMode(_top_half, 1),
    "paa'b": QueryMode(_without_result, 1, depths=_LAST),
    "cat-paa'b": QueryMode(_quadrants, 3, depths=_LAST),
    "paa'b3": QueryMode(_without_result, 1, depths=_THREE),
    "cat-paa'b3": QueryMode(_quadrants, 3, depths=_THREE),
}


def query_mode(name: str) -> QueryMode:
    """The mode called `name`; UserError with the known names if there is none."""
    if name not in QUERY_MODES:
        raise UserError(f"the query mode {name!r} is not known; choose one of {', '.join(QUERY_MODES)}")
    return QUERY_MODES[name]


def query_dim(name: str, model: ImageEncoderModel) -> int:
    """q, the width of a mode's query: what a basis's `query_dim` must be."""
    mode = query_mode(name)
    outputs = mode.view_count if mode.weights is None else len(mode.weights)
    return outputs * embedding_dim(name, model)


def embedding_dim(name: str, model: ImageEncoderModel) -> int:
    """e, the width of what `embed` says of one view."""
    depths = query_mode(name).depths
    return model.embedding_width if depths is None else len(depths) * model.patch_width


def views(name: str, grids: list[np.ndarray], processor) -> np.ndarray:
    """On the host: condition grids uint8 [H, W, 3] of any sizes -> what the encoder sees, uint8 [b, v, h, w, 3]."""
    cut = query_mode(name).views
    return np.stack([np.stack([processor.resized(view) for view in cut(grid)]) for grid in grids])


def query(name: str, model: ImageEncoderModel, pixels: jax.Array) -> jax.Array:
    """Traceable: normalised views [b, v, h, w, 3] (`processor.normalised(views(...))`) -> query float32 [b, q]."""
    b, v = pixels.shape[:2]
    embeddings = embed(name, model, pixels.reshape(b * v, *pixels.shape[2:]))
    return jnp.asarray(compose(name, embeddings.reshape(b, v, -1)))


def embed(name: str, model: ImageEncoderModel, pixels: jax.Array) -> jax.Array:
    """Traceable: normalised views [b, h, w, 3] -> what the encoder says of each, float32 [b, e]."""
    mode = query_mode(name)
    if mode.depths is None:
        return model(pixels)
    means = [tokens.mean(1) for tokens in _hidden(mode.depths, model, pixels)]
    return jnp.concatenate(means, -1)  # depths of a view together


def compose(name: str, embeddings: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Embeddings of an analogy's views [b, v, e] -> query [b, q], by numpy or by jax, whichever holds them."""
    weights = query_mode(name).weights
    if weights is not None:
        embeddings = (np.asarray(weights, np.float32)[None, :, :, None] * embeddings[:, None]).sum(2)  # [b, o, e]
    return embeddings.reshape(embeddings.shape[0], -1)


def embedding_kind(name: str) -> str:
    """A name of what `embed` computes: modes with the same one share embeddings."""
    depths = query_mode(name).depths
    return "projected" if depths is None else f"means of hidden states {', '.join(f'-{depth}' for depth in depths)}"


def patch_tokens(name: str, model: ImageEncoderModel, pixels: jax.Array) -> jax.Array:
    """A patch mode's tokens before their mean: [b, v, depths, s, d], for comparison with the published code."""
    depths = query_mode(name).depths
    if depths is None:
        raise ValueError(f"the query mode {name!r} is not made of patch tokens")
    b, v = pixels.shape[:2]
    states = _hidden(depths, model, pixels.reshape(b * v, *pixels.shape[2:]))
    return jnp.stack([state.reshape(b, v, *state.shape[1:]) for state in states], 2)


def _hidden(depths: tuple[int, ...], model: ImageEncoderModel, pixels: jax.Array) -> list[jax.Array]:
    """Hidden states [b, s, d] of each of a mode's depths."""
    states = model.hidden_states(pixels)
    if max(depths) > len(states):
        # An encoder of fewer layers than the published modes count back: the first, the middle and the last state.
        depths = (len(states), (len(states) + 1) // 2, 1)
    return [states[-depth] for depth in depths]
