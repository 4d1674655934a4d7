"""Any image encoder that the router may ask: its kind is decided by its folder's config.json."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.schema import read_json, shown
from lorweb_jax.files.hub_cache import ENCODER_FILES, existing
from lorweb_jax.files.state import build
from lorweb_jax.files.table import Stored
from lorweb_jax.models.clip import folder as clip
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.processor import FILE, ImageProcessor
from lorweb_jax.models.siglip import model as siglip
from lorweb_jax.nn.sharding import to_host

Tower = clip.ClipVision | siglip.SiglipVision
_CLIP, _SIGLIP = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model")


@dataclass(frozen=True)
class ImageEncoder:
    """An encoder (nnx.Module, frozen Weights) with its image processor."""

    model: Tower
    processor: ImageProcessor

    def query(self, mode: str, grids: list[np.ndarray]) -> np.ndarray:
        """Condition grids uint8 [H, W, 3] of any sizes -> the mode's query, float32 [b, q]."""
        return to_host(_query(mode, self.processor, self.model, queries.views(mode, grids, self.processor)))

    def query_dim(self, mode: str) -> int:
        """q, the width of `query`'s result."""
        return queries.query_dim(mode, self.model)

    def embed(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 images [H, W, 3] of any sizes -> their embeddings, float32 [b, p]."""
        return to_host(
            _embed(self.processor, self.model, np.stack([self.processor.resized(image) for image in images]))
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _query(mode, processor, model, views):
    return queries.query(mode, model, processor.normalised(views))


@functools.partial(jax.jit, static_argnums=0)
def _embed(processor, model, images):
    return model(processor.normalised(images))


@dataclass(frozen=True)
class ImageEncoderFolder:
    """A folder's encoder before its weights are read: what a training job needs to place them itself.

    make(rngs) -> the module; open() -> its weights, not yet read.
    """

    make: Callable[[nnx.Rngs], Tower]
    open: Callable[[], Stored]
    processor: ImageProcessor


def existing_encoder(folder: str | Path) -> Path:
    """The folder of an encoder by its path or its Hub name; UserError where there is none."""
    return existing(folder, ENCODER_FILES, "the folder of a CLIP or SigLIP model", ("config.json",))


def open_image_encoder(folder: str | Path) -> ImageEncoderFolder:
    """Read configs, not weights. Raises UserError if the folder holds no image encoder that is known here."""
    folder = existing_encoder(folder)
    model_type = read_json(Path(folder) / "config.json").get("model_type")
    processor = ImageProcessor.from_folder(folder)

    def require_size(size: int, patch: int) -> None:
        if processor.made_size != (size, size):
            raise UserError(
                f"{Path(folder, FILE)} makes images of {processor.made_size} pixels, but the encoder takes "
                f"{(size, size)}; copy both files again from where the encoder came from"
            )
        if patch > size:
            raise UserError(
                f"{folder}/config.json has patch_size {patch} and image_size {size}, which holds none; copy it "
                "again from where the encoder came from"
            )

    if model_type in _CLIP:
        config = clip.vision_config(folder)
        require_size(config.image_size, config.patch_size)
        return ImageEncoderFolder(
            lambda rngs: clip.ClipVision(config, rngs=rngs), lambda: clip.open_clip_vision(folder)[1], processor
        )
    if model_type in _SIGLIP:
        config = siglip.SiglipConfig.from_folder(folder)
        require_size(config.image_size, config.patch_size)
        return ImageEncoderFolder(
            lambda rngs: siglip.SiglipVision(config, rngs=rngs), lambda: siglip.open_siglip(folder)[1], processor
        )
    raise UserError(
        f"{folder} holds a model of type {shown(model_type)}, expected one of {', '.join(_CLIP + _SIGLIP)}; "
        "give the folder of a CLIP or SigLIP model"
    )


def load_image_encoder(folder: str | Path) -> ImageEncoder:
    """The encoder of a folder with config.json, preprocessor_config.json and safetensors."""
    opened = open_image_encoder(folder)
    return ImageEncoder(build(lambda: opened.make(nnx.Rngs(0)), opened.open().load(), str(folder)), opened.processor)
