"""CLIP text and CLIP vision with projection: the one module that touches transformers' Flax classes.

The day transformers' Flax code no longer installs, only this file changes. Each model is an nnx.Module whose
parameters are `layers.Weight`s under the checkpoint's own names, so that it is trained, sharded and saved like any
other; its equations are transformers' Linen module, applied to them.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from transformers import CLIPTextConfig, CLIPVisionConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPTextTransformer, FlaxCLIPVisionTransformer

from lorweb_jax.errors import UserError
from lorweb_jax.layers import Linear, Weight
from lorweb_jax.schema import read_json
from lorweb_jax.weights.checkpoint import Checkpoint
from lorweb_jax.weights.safetensors_io import write_json, write_stream
from lorweb_jax.weights.state import build, flat_state, shapes
from lorweb_jax.weights.table import CONV, LINEAR, Row, Stored, tensors_of


class LinenModel(nnx.Module):
    """A Linen module's parameters as Weights in a tree of modules; `apply` runs it on them."""

    def __init__(self, linen, *example: jax.Array, rngs: nnx.Rngs):
        self._linen = linen
        for name, value in linen.init(rngs.params(), *example)["params"].items():
            setattr(self, name, _weights(value))

    def apply(self, *inputs: jax.Array, **options: Any):
        # Linen's embeddings compute in the dtype they are stored in; here all is computed in float32.
        parameters = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.to_pure_dict(nnx.state(self, Weight)))
        return self._linen.apply({"params": parameters}, *inputs, **options)


def _weights(value: Any) -> nnx.Dict | Weight:
    return nnx.Dict({k: _weights(v) for k, v in value.items()}) if isinstance(value, dict) else Weight(value)


class ClipText(nnx.Module):
    """CLIP's text tower: token ids -> the end token's embedding."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        ids = jnp.zeros((1, 1), jnp.int32)
        self.text_model = LinenModel(FlaxCLIPTextTransformer(config), ids, jnp.ones_like(ids), ids, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """ids int [b, t] -> pooled float32 [b, d]: the last layer's normalised output at the end token."""
        ids = jnp.asarray(ids, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return self.text_model.apply(ids, jnp.ones_like(ids), positions).pooler_output


class ClipVision(nnx.Module):
    """CLIP's vision tower with its projection (transformers' CLIPVisionModelWithProjection)."""

    def __init__(self, config: CLIPVisionConfig, *, rngs: nnx.Rngs):
        self.config = config
        pixels = jnp.zeros((1, config.image_size, config.image_size, config.num_channels))
        self.vision_model = LinenModel(FlaxCLIPVisionTransformer(config), pixels, rngs=rngs)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, bias=False, rngs=rngs)

    @property
    def embedding_width(self) -> int:
        return self.config.projection_dim

    @property
    def patch_width(self) -> int:
        return self.config.hidden_size

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """pixel values float32 [b, h, w, 3] from the folder's ImageProcessor -> projected embedding [b, p]."""
        return self.visual_projection(self.vision_model.apply(pixels).pooler_output)

    def hidden_states(self, pixels: jax.Array) -> tuple[jax.Array, ...]:
        """pixel values [b, h, w, 3] -> the embeddings and each layer's output, [b, s, d] with CLS, not normalised."""
        return self.vision_model.apply(pixels, output_hidden_states=True).hidden_states


def table(parameters: dict[str, Any]) -> list[Row]:
    """The conversion table of a ClipText or ClipVision from its parameters (or shapes) by path."""
    return [_row(path, len(value.shape)) for path, value in parameters.items()]


def _row(path: str, ndim: int) -> Row:
    stem, _, leaf = path.rpartition(".")
    if leaf == "kernel":
        return Row(path, f"{stem}.weight", CONV if ndim == 4 else LINEAR)
    return Row(path, f"{stem}.weight" if leaf in ("embedding", "scale") else path)


def text_config(folder: str | Path) -> CLIPTextConfig:
    """The text tower's config of a folder that holds a CLIPTextModel or a whole CLIPModel."""
    data = read_json(Path(folder) / "config.json")
    return CLIPTextConfig(**_part(data, "text_config", "clip_text_model", folder))


def vision_config(folder: str | Path) -> CLIPVisionConfig:
    """The vision tower's config of a folder that holds a CLIPVisionModelWithProjection or a whole CLIPModel."""
    data = read_json(Path(folder) / "config.json")
    return CLIPVisionConfig(**_part(data, "vision_config", "clip_vision_model", folder))


def _part(data: dict, name: str, model_type: str, folder: str | Path) -> dict:
    if data.get("model_type") == "clip" and isinstance(data.get(name), dict):
        # A whole model's projection width stands beside its two parts; 512 is what transformers takes without it.
        return data[name] | {"projection_dim": data.get("projection_dim", 512)}
    if data.get("model_type") == model_type:
        return data
    raise UserError(f"{folder} holds a model of type {data.get('model_type')!r}, expected 'clip' or {model_type!r}; "
                    "give the folder of a CLIP model")


def _open(folder: str | Path, make, prefixes: tuple[str, ...]) -> Stored:
    """Weights that are not yet read; a whole CLIPModel's rest and old position_ids are passed over."""
    checkpoint, expected = Checkpoint(folder), shapes(make)
    ignored = [key for key in checkpoint if not key.startswith(prefixes) or key.endswith("position_ids")]
    return Stored(checkpoint, table(expected), expected, ignored)


def open_clip_text(folder: str | Path) -> tuple[CLIPTextConfig, Stored]:
    """(config, weights that are not yet read) of a text_encoder folder. UserError if they don't fit each other."""
    config = text_config(folder)
    return config, _open(folder, lambda: ClipText(config, rngs=nnx.Rngs(0)), ("text_model.",))


def open_clip_vision(folder: str | Path) -> tuple[CLIPVisionConfig, Stored]:
    """(config, weights that are not yet read) of a vision folder. UserError if they don't fit each other."""
    config = vision_config(folder)
    return config, _open(folder, lambda: ClipVision(config, rngs=nnx.Rngs(0)), ("vision_model.", "visual_projection."))


def load_clip_text(folder: str | Path) -> ClipText:
    """The text tower of a folder with single or sharded safetensors."""
    config, stored = open_clip_text(folder)
    return build(lambda: ClipText(config, rngs=nnx.Rngs(0)), stored.load(), str(folder))


def load_clip_vision(folder: str | Path) -> ClipVision:
    """The vision tower of a folder with single or sharded safetensors."""
    config, stored = open_clip_vision(folder)
    return build(lambda: ClipVision(config, rngs=nnx.Rngs(0)), stored.load(), str(folder))


def save_clip(model: ClipText | ClipVision, folder: str | Path, dtype: Any = None) -> None:
    """Write config.json and model.safetensors (in `dtype`, or as they are), for transformers' CLIPTextModel or
    CLIPVisionModelWithProjection."""
    folder, parameters = Path(folder), flat_state(model)
    architecture = "CLIPTextModel" if isinstance(model, ClipText) else "CLIPVisionModelWithProjection"
    write_stream(folder / "model.safetensors", *tensors_of(parameters, table(parameters), dtype), {"format": "pt"})
    write_json(folder / "config.json", model.config.to_dict() | {"architectures": [architecture]})
