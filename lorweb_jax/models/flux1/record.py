"""FLUX.1's record (models/backbone.py): every linear layer of its transformer, and what else tells it from others.

Names in files: diffusers' layout, and Black Forest Labs' single file. In the latter q, k and v of a stream are fused in
one `qkv`, and q, k, v and the MLP's input of a single block in one `linear1`, in this order; the last modulation is
(shift, scale) there and (scale, shift) in diffusers'.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax

from lorweb_jax.files.table import Row
from lorweb_jax.flow.schedule import Schedule
from lorweb_jax.models.autoencoder.model import AutoencoderKL
from lorweb_jax.models.backbone import Backbone, Latents, Linear, Name, References, Role, Stream
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.embeddings import SINUSOID_WIDTH
from lorweb_jax.models.flux1.packing import PATCH, pack, position_ids, text_ids, unpack

LAYOUTS = ("diffusers", "black_forest")
DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
# How names of blocks begin in each layout, by stack.
_PREFIXES = {
    "": ("", ""),
    DOUBLE: (f"{DOUBLE}.{{l}}.", "double_blocks.{l}."),
    SINGLE: (f"{SINGLE}.{{l}}.", "single_blocks.{l}."),
}

# By stack, of each layer: path in the block | inputs | outputs | stream | role | diffusers' name | Black Forest Labs'.
# Widths are multiples of c in_channels, d the model's width, j joint_attention_dim, p pooled_projection_dim, f the
# sinusoids'. name#1 is the second part of a fused layer; ~name has its halves swapped.
_TABLE = {
    "": """
x_embedder                                  c   d   image   embedder    x_embedder                                  img_in
context_embedder                            j   d   text    embedder    context_embedder                            txt_in
time_text_embed.timestep_embedder.linear_1  f   d   vector  embedder    time_text_embed.timestep_embedder.linear_1  time_in.in_layer
time_text_embed.timestep_embedder.linear_2  d   d   vector  vector      time_text_embed.timestep_embedder.linear_2  time_in.out_layer
time_text_embed.guidance_embedder.linear_1  f   d   vector  embedder    time_text_embed.guidance_embedder.linear_1  guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2  d   d   vector  vector      time_text_embed.guidance_embedder.linear_2  guidance_in.out_layer
time_text_embed.text_embedder.linear_1      p   d   vector  embedder    time_text_embed.text_embedder.linear_1      vector_in.in_layer
time_text_embed.text_embedder.linear_2      d   d   vector  vector      time_text_embed.text_embedder.linear_2      vector_in.out_layer
norm_out.linear                             d   2d  vector  vector      norm_out.linear                             ~final_layer.adaLN_modulation.1
proj_out                                    d   c   image   output      proj_out                                    final_layer.linear
""",  # noqa: E501
    DOUBLE: """
norm1.linear           d   6d  vector  modulation  norm1.linear           img_mod.lin
norm1_context.linear   d   6d  vector  modulation  norm1_context.linear   txt_mod.lin
attn.to_q              d   d   image   column      attn.to_q              img_attn.qkv#0
attn.to_k              d   d   image   column      attn.to_k              img_attn.qkv#1
attn.to_v              d   d   image   column      attn.to_v              img_attn.qkv#2
attn.add_k_proj        d   d   text    column      attn.add_k_proj        txt_attn.qkv#1
attn.add_v_proj        d   d   text    column      attn.add_v_proj        txt_attn.qkv#2
attn.add_q_proj        d   d   text    column      attn.add_q_proj        txt_attn.qkv#0
attn.to_out_0          d   d   image   row         attn.to_out.0          img_attn.proj
attn.to_add_out        d   d   text    row         attn.to_add_out        txt_attn.proj
ff.net_0_proj          d   4d  image   column      ff.net.0.proj          img_mlp.0
ff.net_2               4d  d   image   row         ff.net.2               img_mlp.2
ff_context.net_0_proj  d   4d  text    column      ff_context.net.0.proj  txt_mlp.0
ff_context.net_2       4d  d   text    row         ff_context.net.2       txt_mlp.2
""",
    SINGLE: """
norm.linear            d   3d  vector  modulation  norm.linear            modulation.lin
proj_mlp               d   4d  joint   column      proj_mlp               linear1#3
proj_out               5d  d   joint   row         proj_out               linear2
attn.to_q              d   d   joint   column      attn.to_q              linear1#0
attn.to_k              d   d   joint   column      attn.to_k              linear1#1
attn.to_v              d   d   joint   column      attn.to_v              linear1#2
""",
}
# Norms' scales, by stack: path in the block, which is diffusers' name too | Black Forest Labs' name.
_NORMS = {
    DOUBLE: """
attn.norm_q          img_attn.norm.query_norm
attn.norm_k          img_attn.norm.key_norm
attn.norm_added_q    txt_attn.norm.query_norm
attn.norm_added_k    txt_attn.norm.key_norm
""",
    SINGLE: """
attn.norm_q          norm.query_norm
attn.norm_k          norm.key_norm
""",
}


class Layer(NamedTuple):
    """A line of the table: a layer of FLUX.1, whatever its sizes."""

    path: str
    stack: str
    inputs: str
    outputs: str
    stream: Stream
    role: Role
    names: dict[str, Name]


def _lines(tables: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """(stack, columns) of each line."""
    for stack, table in tables.items():
        for line in table.strip().splitlines():
            yield stack, line.split()


def _name(prefix: str, text: str) -> Name:
    key, _, part = text.partition("#")
    return Name(prefix + key.removeprefix("~"), int(part or 0), key.startswith("~"))


LAYERS = tuple(
    Layer(
        ".".join(filter(None, (stack, path))),
        stack,
        inputs,
        outputs,
        cast(Stream, stream),
        cast(Role, role),
        {layout: _name(prefix, text) for layout, prefix, text in zip(LAYOUTS, _PREFIXES[stack], names, strict=True)},
    )
    for stack, (path, inputs, outputs, stream, role, *names) in _lines(_TABLE)
)


def _norms(layout: str) -> list[Row]:
    """Rows of the norms' scales."""
    rows = []
    for stack, (path, name) in _lines(_NORMS):
        diffusers, black_forest = _PREFIXES[stack]
        key = f"{diffusers}{path}.weight" if layout == "diffusers" else f"{black_forest}{name}.scale"
        rows.append(Row(f"{stack}.{path}.scale", key))
    return rows


def encode_text(encoders: tuple[Any, Any], ids: tuple[jax.Array, jax.Array], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """CLIP's and T5's token ids [b, 77] and [b, t] -> T5's hidden states [b, t, j], and CLIP's pooled text [b, p]."""
    (clip, t5), (clip_ids, t5_ids) = encoders, ids
    return t5(t5_ids, dtype=dtype), clip(clip_ids).astype(dtype)


def _grid(a, a2, b, max_size: int | None = None) -> list:
    """Kontext is shown one image, the grid [a, a′; b, b]."""
    from lorweb_jax.images.grid import condition_grid  # Pillow, which the model itself does without

    return [condition_grid(a, a2, b, max_size)]


def _quadrant(image: Any) -> Any:
    """The grid's quadrant b′."""
    from lorweb_jax.images.grid import bottom_right

    return bottom_right(image)


@functools.cache
def backbone(config: FluxConfig) -> Backbone:
    """The record of a FLUX.1 transformer of these sizes. What stands inside the blocks is adapted (method.md §3)."""
    depths = {"": 1, DOUBLE: config.num_layers, SINGLE: config.num_single_layers}
    sizes = {
        "c": config.in_channels,
        "d": config.features,
        "j": config.joint_attention_dim,
        "p": config.pooled_projection_dim,
        "f": SINUSOID_WIDTH,
    }

    def width(text: str) -> int:
        return int(text[:-1] or 1) * sizes[text[-1]]

    return Backbone(
        features=config.features,
        heads=config.num_attention_heads,
        stacks=((DOUBLE, config.num_layers), (SINGLE, config.num_single_layers)),
        layers=tuple(
            Linear(
                layer.path,
                layer.stack,
                depths[layer.stack],
                width(layer.inputs),
                width(layer.outputs),
                layer.stream,
                layer.role,
                adapted=bool(layer.stack),
                names=layer.names,
            )
            for layer in LAYERS
            if depths[layer.stack] and (config.guidance_embeds or "guidance_embedder" not in layer.path)
        ),
        other_rows=_norms,
        position_ids=position_ids,
        text_ids=text_ids,
        text=encode_text,
        latents=Latents(AutoencoderKL.latents, AutoencoderKL.posterior, AutoencoderKL.image, pack, unpack, PATCH),
        references=References(_grid, _quadrant),
        schedule=Schedule,
    )
