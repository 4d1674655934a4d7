"""Model FLOPs of a step, counted from shapes (method.md §1): the matrix products that the mathematics asks for.

Elementwise work isn't counted, nor is what remat recomputes. A product of [m, i] and [i, o] is 2·m·i·o. Going
backward, each product costs as much again for each of its two inputs that needs a gradient.
"""

from typing import Any

from lorweb_jax.models.flux1.embeddings import SINUSOID_WIDTH
from lorweb_jax.models.flux1.model import FluxConfig, block_linears

_TEXT_STREAM = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context")
_MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")

# Times each part's forward FLOPs: 1 forward, 1 for gradients of inputs, 1 for gradients of weights.
_FACTORS = {
    "forward": dict(
        linears=1,
        modulation=1,
        attention=1,
        embedders=1,
        vector_first=1,
        vector_second=1,
        output_modulation=1,
        output=1,
    ),
    # Forward with modulations that are known.
    "velocity": dict(
        linears=1,
        modulation=0,
        attention=1,
        embedders=1,
        vector_first=0,
        vector_second=0,
        output_modulation=0,
        output=1,
    ),
    # Gradient of all weights; the model's own inputs need none.
    "weights": dict(
        linears=3,
        modulation=3,
        attention=3,
        embedders=2,
        vector_first=2,
        vector_second=3,
        output_modulation=3,
        output=3,
    ),
    # Frozen weights, gradient of the image and text tokens that come in.
    "inputs": dict(
        linears=2,
        modulation=1,
        attention=3,
        embedders=2,
        vector_first=1,
        vector_second=1,
        output_modulation=1,
        output=2,
    ),
    # Frozen weights, gradient of what sits beside the linear layers of the blocks.
    "basis": dict(
        linears=2,
        modulation=1,
        attention=3,
        embedders=1,
        vector_first=1,
        vector_second=1,
        output_modulation=1,
        output=2,
    ),
}


def rows(path: str, tokens: int, text: int) -> int:
    """How many vectors of an example the block's linear layer `path` (of `block_linears`) is applied to."""
    if path.endswith(_MODULATION):
        return 1
    if path.startswith("single_transformer_blocks"):
        return tokens + text
    return text if any(name in path for name in _TEXT_STREAM) else tokens


def base_flops(kind: str, config: FluxConfig, batch: int, tokens: int, text: int) -> int:
    """FLOPs of the plain transformer; `kind` is a key of _FACTORS (see above)."""
    d, length = config.features, tokens + text
    blocks = {
        path: shape.depth * rows(path, tokens, text) * shape.inputs * shape.outputs
        for path, shape in block_linears(config).items()
    }
    modulation = sum(count for path, count in blocks.items() if path.endswith(_MODULATION))
    sinusoids = 2 if config.guidance_embeds else 1
    products = {
        "linears": sum(blocks.values()) - modulation,
        "modulation": modulation,
        # Scores and weighted sum.
        "attention": (config.num_layers + config.num_single_layers) * 2 * length * length * d,
        "embedders": tokens * config.in_channels * d + text * config.joint_attention_dim * d,
        "vector_first": (sinusoids * SINUSOID_WIDTH + config.pooled_projection_dim) * d,
        "vector_second": (sinusoids + 1) * d * d,
        "output_modulation": 2 * d * d,
        "output": tokens * d * config.in_channels,
    }
    return 2 * batch * sum(factor * products[part] for part, factor in _FACTORS[kind].items())


def basis_flops(kind: str, setting: Any) -> int:
    """FLOPs that a basis adds, for a setting with the fields model (a FluxConfig), basis (a BasisConfig), batch,
    tokens and text_tokens: in "forward" the two low-rank products of every layer, in "velocity" of those that
    aren't modulations; in "basis" also their gradients and the router, whose coefficients a training step computes
    anew."""
    basis, total = setting.basis, 0
    width, n = basis.size * basis.rank, basis.size
    for path, (depth, i, o) in block_linears(setting.model).items():
        m = rows(path, setting.tokens, setting.text_tokens)
        if kind == "velocity" and path.endswith(_MODULATION):
            continue
        if kind in ("forward", "velocity"):
            total += depth * m * width * (i + o)
            continue
        # A modulation's input depends on nothing trained.
        total += depth * m * width * ((2 if path.endswith(_MODULATION) else 3) * i + 3 * o)
        total += depth * basis.key_dim * (2 * basis.query_dim + 3 * n)
    return 2 * setting.batch * total
