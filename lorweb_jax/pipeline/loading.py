"""A pipeline's weights from its folder into the model."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.files.state import abstract_shapes, fill
from lorweb_jax.nn.attention import IMPLEMENTATIONS, resolve
from lorweb_jax.nn.offload import OFFLOADS, offloaded
from lorweb_jax.nn.quantization import KINDS
from lorweb_jax.pipeline import devices
from lorweb_jax.pipeline.arguments import as_dtype, as_path
from lorweb_jax.pipeline.folder import PipelineFolder
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.processes.compiler_flags import set_compiler_flags
from lorweb_jax.settings.rules import Choice, Flag, as_value


def load(
    folder: str | Path,
    image_encoder: str | Path | None,
    *,
    dtype: Any,
    attention: str,
    quantization: str,
    unstacked: bool,
    offload: str,
    mesh: Mapping[str, int] | None,
) -> tuple[PipelineFolder, AnalogyModel]:
    """See Pipeline.load."""
    set_compiler_flags()
    unstacked, offload = as_value(unstacked, "unstacked", Flag()), as_value(offload, "offload", Choice(OFFLOADS))
    if unstacked and offload != "none":
        raise UserError(
            "unstacked blocks were asked for beside offload 'blocks', which streams stacks; leave one of them out", 2
        )
    quantization = as_value(quantization, "quantization", Choice(KINDS))
    pipeline = PipelineFolder(
        as_path(folder, "the pipeline"), None if image_encoder is None else as_path(image_encoder, "the image encoder")
    )
    dtype, mesh = as_dtype(dtype), devices.as_mesh(mesh, pipeline.flux_config.num_attention_heads)
    attention = as_value(attention, "attention", Choice(IMPLEMENTATIONS))
    attention = resolve(attention, jax.default_backend(), dtype, pipeline.flux_config.attention_head_dim)

    make = functools.partial(pipeline.make, dtype=dtype, attention=attention, quantization=quantization)
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    shapes = abstract_shapes(model)

    def stored(path: str) -> jnp.dtype:
        if shapes[path].dtype != jnp.float32 or path.removesuffix(".scale") + ".kernel" in shapes:  # 8 bit
            return shapes[path].dtype
        return dtype if path.startswith(("transformer.", "text_encoder")) else jnp.dtype(jnp.float32)

    targets = devices.targets(model, {path: stored(path) for path in shapes}, mesh)
    if offload == "blocks":
        targets = offloaded(targets, pipeline.stacks)
    model = fill(model, pipeline.read(targets), str(folder))
    if unstacked:
        model.transformer.unstack()
    return pipeline, model
