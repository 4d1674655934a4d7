"""CLIP text and CLIP vision with projection: folders in transformers' layout, read and written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import checked, read_json
from lorweb_jax.files.checkpoint import Checkpoint
from lorweb_jax.files.safetensors_io import write_json, write_stream
from lorweb_jax.files.state import build, flat_state, shapes
from lorweb_jax.files.table import Row, Stored, tensors_of
from lorweb_jax.models.clip.towers import (
    TEXT_TABLE,
    VISION_TABLE,
    ClipText,
    CLIPTextConfig,
    ClipVision,
    CLIPVisionConfig,
)

__all__ = [
    "CLIPTextConfig",
    "CLIPVisionConfig",
    "ClipText",
    "ClipVision",
    "TEXT_TABLE",
    "VISION_TABLE",
    "load_clip_text",
    "load_clip_vision",
    "open_clip_text",
    "open_clip_vision",
    "save_clip",
    "text_config",
    "vision_config",
]


def text_config(folder: str | Path) -> CLIPTextConfig:
    """The text tower's config of a folder that holds a CLIPTextModel or a whole CLIPModel."""
    return _config(CLIPTextConfig, "text_config", Path(folder) / "config.json")


def vision_config(folder: str | Path) -> CLIPVisionConfig:
    """The vision tower's config of a folder that holds a CLIPVisionModelWithProjection or a whole CLIPModel."""
    return _config(CLIPVisionConfig, "vision_config", Path(folder) / "config.json")


def _config(kind: type, name: str, path: Path) -> Any:
    data = read_json(path)
    if data.get("model_type") == "clip" and isinstance(data.get(name), dict):
        # A whole model's projection width stands beside its two parts; 512 is what transformers takes without it.
        return checked(data[name] | {"projection_dim": data.get("projection_dim", 512)}, kind, path)
    if data.get("model_type") == kind.model_type:
        return checked(data, kind, path)
    raise UserError(
        f"{path.parent} holds a model of type {data.get('model_type')!r}, expected 'clip' or "
        f"{kind.model_type!r}; give the folder of a CLIP model"
    )


def _open(folder: str | Path, make: Callable[[], nnx.Module], table: list[Row]) -> Stored:
    """Weights that are not yet read; a whole CLIPModel's rest and old position_ids are passed over."""
    checkpoint = Checkpoint(folder)
    prefixes = tuple({row.key.split(".")[0] + "." for row in table})
    ignored = [key for key in checkpoint if not key.startswith(prefixes) or key.endswith("position_ids")]
    return Stored(checkpoint, table, shapes(make), ignored)


def open_clip_text(folder: str | Path) -> tuple[CLIPTextConfig, Stored]:
    """(config, weights that are not yet read) of a text_encoder folder. UserError if they don't fit each other."""
    config = text_config(folder)
    return config, _open(folder, lambda: ClipText(config, rngs=nnx.Rngs(0)), TEXT_TABLE)


def open_clip_vision(folder: str | Path) -> tuple[CLIPVisionConfig, Stored]:
    """(config, weights that are not yet read) of a vision folder. UserError if they don't fit each other."""
    config = vision_config(folder)
    return config, _open(folder, lambda: ClipVision(config, rngs=nnx.Rngs(0)), VISION_TABLE)


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
    folder, table = Path(folder), TEXT_TABLE if isinstance(model, ClipText) else VISION_TABLE
    write_stream(folder / "model.safetensors", *tensors_of(flat_state(model), table, dtype), {"format": "pt"})
    write_json(folder / "config.json", model.config.to_json())
