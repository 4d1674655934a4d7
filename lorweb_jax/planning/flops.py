"""Model FLOPs of a step, counted from a backbone's record (method.md §1): the matrix products that the mathematics asks
for.

Elementwise work isn't counted, nor is what remat recomputes. A product of [m, i] and [i, o] is 2·m·i·o. Going
backward, each product costs as much again for each of its two inputs that needs a gradient.
"""

from typing import Any

from lorweb_jax.models.backbone import Backbone, Linear

# forward: the whole model. velocity: forward with modulations that are known. weights: gradient of all weights; the
# model's own inputs need none. inputs: frozen weights, gradient of the image and text tokens that come in. basis:
# frozen weights, gradient of what sits beside the linear layers of the blocks.
KINDS = ("forward", "velocity", "weights", "inputs", "basis")


def _passes(kind: str, layer: Linear) -> int:
    """How many products of the forward pass's size a layer costs."""
    vector, first = layer.stream == "vector", layer.role == "embedder"
    return {
        "forward": 1,
        "velocity": 0 if vector else 1,
        "weights": 2 if first else 3,
        "inputs": 1 if vector else 2,
        "basis": 1 if vector or first else 2,
    }[kind]


def base_flops(kind: str, backbone: Backbone, batch: int, tokens: int, text: int) -> int:
    """FLOPs of the plain transformer, of one of KINDS, for so many image and text tokens an example."""
    linears = sum(
        _passes(kind, layer) * layer.rows(tokens, text) * layer.weights for layer in backbone.linears.values()
    )
    # Scores and weighted sum; going backward both of their inputs need gradients.
    attention = backbone.blocks * 2 * (tokens + text) ** 2 * backbone.features
    return 2 * batch * (linears + attention * (1 if kind in ("forward", "velocity") else 3))


def basis_flops(kind: str, backbone: Backbone, basis: Any, batch: int, tokens: int, text: int) -> int:
    """FLOPs that a basis adds, for the fields size, rank, key_dim and query_dim of a BasisConfig: in "forward" the two
    low-rank products of every layer, in "velocity" of those that aren't modulations; in "basis" also their gradients
    and the router, whose coefficients a training step computes anew. ValueError for another kind."""
    if kind not in ("forward", "velocity", "basis"):
        raise ValueError(f"the kind is {kind}; a basis is counted in forward, velocity and basis")
    total, width = 0, basis.size * basis.rank
    for layer in backbone.adapted.values():
        m, i, o = layer.rows(tokens, text), layer.inputs, layer.outputs
        if kind == "forward" or kind == "velocity" and not layer.modulation:
            total += layer.depth * m * width * (i + o)
        elif kind == "basis":
            # A modulation's input depends on nothing trained.
            total += layer.depth * m * width * ((2 if layer.modulation else 3) * i + 3 * o)
            total += layer.depth * basis.key_dim * (2 * basis.query_dim + 3 * basis.size)
    return 2 * batch * total
