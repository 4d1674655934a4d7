"""The FLUX transformer's parameters in diffusers' layout and in Black Forest Labs' single file.

One line a layer: our path | diffusers | Black Forest Labs. In the latter, layers with the same name are fused: q, k
and v of a stream in one `qkv`, and q, k, v and the MLP's input of a single block in one `linear1`, in this order.
"""

from collections.abc import Mapping
from typing import Any

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.table import LINEAR, Row

_D, _S = "transformer_blocks.{l}.", "single_transformer_blocks.{l}."
_BD, _BS = "double_blocks.{l}.", "single_blocks.{l}."
_T = "time_text_embed."

# (our path, diffusers' name, Black Forest Labs' name) of every linear layer.
LINEARS = [
    line.split()
    for line in f"""
x_embedder                         x_embedder                         img_in
context_embedder                   context_embedder                   txt_in
{_T}timestep_embedder.linear_1     {_T}timestep_embedder.linear_1     time_in.in_layer
{_T}timestep_embedder.linear_2     {_T}timestep_embedder.linear_2     time_in.out_layer
{_T}guidance_embedder.linear_1     {_T}guidance_embedder.linear_1     guidance_in.in_layer
{_T}guidance_embedder.linear_2     {_T}guidance_embedder.linear_2     guidance_in.out_layer
{_T}text_embedder.linear_1         {_T}text_embedder.linear_1         vector_in.in_layer
{_T}text_embedder.linear_2         {_T}text_embedder.linear_2         vector_in.out_layer
transformer_blocks.norm1.linear             {_D}norm1.linear            {_BD}img_mod.lin
transformer_blocks.norm1_context.linear     {_D}norm1_context.linear    {_BD}txt_mod.lin
transformer_blocks.attn.to_q                {_D}attn.to_q               {_BD}img_attn.qkv
transformer_blocks.attn.to_k                {_D}attn.to_k               {_BD}img_attn.qkv
transformer_blocks.attn.to_v                {_D}attn.to_v               {_BD}img_attn.qkv
transformer_blocks.attn.add_q_proj          {_D}attn.add_q_proj         {_BD}txt_attn.qkv
transformer_blocks.attn.add_k_proj          {_D}attn.add_k_proj         {_BD}txt_attn.qkv
transformer_blocks.attn.add_v_proj          {_D}attn.add_v_proj         {_BD}txt_attn.qkv
transformer_blocks.attn.to_out_0            {_D}attn.to_out.0           {_BD}img_attn.proj
transformer_blocks.attn.to_add_out          {_D}attn.to_add_out         {_BD}txt_attn.proj
transformer_blocks.ff.net_0_proj            {_D}ff.net.0.proj           {_BD}img_mlp.0
transformer_blocks.ff.net_2                 {_D}ff.net.2                {_BD}img_mlp.2
transformer_blocks.ff_context.net_0_proj    {_D}ff_context.net.0.proj   {_BD}txt_mlp.0
transformer_blocks.ff_context.net_2         {_D}ff_context.net.2        {_BD}txt_mlp.2
single_transformer_blocks.norm.linear       {_S}norm.linear             {_BS}modulation.lin
single_transformer_blocks.attn.to_q         {_S}attn.to_q               {_BS}linear1
single_transformer_blocks.attn.to_k         {_S}attn.to_k               {_BS}linear1
single_transformer_blocks.attn.to_v         {_S}attn.to_v               {_BS}linear1
single_transformer_blocks.proj_mlp          {_S}proj_mlp                {_BS}linear1
single_transformer_blocks.proj_out          {_S}proj_out                {_BS}linear2
norm_out.linear                    norm_out.linear                    final_layer.adaLN_modulation.1
proj_out                           proj_out                           final_layer.linear
""".splitlines()
    if line
]

_NORMS = [
    line.split()
    for line in f"""
transformer_blocks.attn.norm_q          {_D}attn.norm_q         {_BD}img_attn.norm.query_norm
transformer_blocks.attn.norm_k          {_D}attn.norm_k         {_BD}img_attn.norm.key_norm
transformer_blocks.attn.norm_added_q    {_D}attn.norm_added_q   {_BD}txt_attn.norm.query_norm
transformer_blocks.attn.norm_added_k    {_D}attn.norm_added_k   {_BD}txt_attn.norm.key_norm
single_transformer_blocks.attn.norm_q   {_S}attn.norm_q         {_BS}norm.query_norm
single_transformer_blocks.attn.norm_k   {_S}attn.norm_k         {_BS}norm.key_norm
""".splitlines()
    if line
]

# diffusers reads its final modulation as (scale, shift), Black Forest Labs as (shift, scale).
_SWAPPED = "norm_out.linear"

# Stacked path of each linear layer inside the blocks -> its name in diffusers' files, with "{l}".
BLOCK_LAYERS = {ours: theirs for ours, theirs, _ in LINEARS if "{l}" in theirs}

DIFFUSERS = [
    row
    for ours, theirs, _ in LINEARS
    for row in (Row(f"{ours}.kernel", f"{theirs}.weight", LINEAR), Row(f"{ours}.bias", f"{theirs}.bias"))
]
DIFFUSERS += [Row(f"{ours}.scale", f"{theirs}.weight") for ours, theirs, _ in _NORMS]

BLACK_FOREST = [
    row
    for ours, _, theirs in LINEARS
    for row in (
        Row(f"{ours}.kernel", f"{theirs}.weight", LINEAR, ours == _SWAPPED),
        Row(f"{ours}.bias", f"{theirs}.bias", None, ours == _SWAPPED),
    )
]
BLACK_FOREST += [Row(f"{ours}.scale", f"{theirs}.scale") for ours, _, theirs in _NORMS]


def black_forest_config(shapes: Mapping[str, tuple[int, ...]], where: str = "the file") -> dict[str, Any]:
    """diffusers' config.json of a Black Forest Labs file, which has none, from its tensors' shapes.

    The rope axes leave no trace in the tensors: 16/56/56 is assumed, which needs heads of width 128. Raises UserError
    where a tensor that tells a size is missing, or the head width is another.
    """

    def blocks(kind: str) -> int:
        return len({key.split(".")[1] for key in shapes if key.startswith(kind + ".")})

    try:
        width, in_channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        joint, pooled = shapes["txt_in.weight"][1], shapes["vector_in.in_layer.weight"][1]
        out_channels = shapes["final_layer.linear.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else "has tensors of other shapes"
        raise UserError(
            f"{where} {missing}; give a whole FLUX transformer in Black Forest Labs' layout, such "
            "as flux1-kontext-dev.safetensors"
        ) from None
    if in_channels != out_channels:
        raise UserError(
            f"{where} takes {in_channels} channels and gives {out_channels}, as FLUX.1 Fill, Depth and "
            "Canny do; give FLUX.1 Kontext or dev"
        )
    if head != 128:
        raise UserError(
            f"{where} has attention heads of width {head}, and rope axes are known only for 128; give "
            "diffusers' config.json with --model-config"
        )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None,
        "num_layers": blocks("double_blocks"),
        "num_single_layers": blocks("single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": joint,
        "pooled_projection_dim": pooled,
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": [16, 56, 56],
    }
