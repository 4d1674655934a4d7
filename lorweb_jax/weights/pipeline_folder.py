"""A FLUX Kontext pipeline folder in diffusers' layout: its configs now, its weights when they are asked for."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.basis.basis import Basis, BasisConfig
from lorweb_jax.encoders import queries
from lorweb_jax.encoders.image_encoder import ImageEncoderFolder, open_image_encoder
from lorweb_jax.encoders.t5 import T5Config, T5Encoder, read_t5
from lorweb_jax.encoders.tokenizers import load_t5_tokenizer, tokenize_clip, tokenize_t5
from lorweb_jax.errors import UserError
from lorweb_jax.flow.schedule import Schedule
from lorweb_jax.latents.vae import AutoencoderKL, VAEConfig
from lorweb_jax.model import AnalogyModel
from lorweb_jax.transformer.flux import Flux, FluxConfig, block_linears
from lorweb_jax.weights.pretrained import load_transformer, load_vae
from lorweb_jax.weights.safetensors_io import read_json

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# T5 instructions are padded to this in FLUX; a pipeline whose tokenizer says less was trained with less.
MAX_TEXT_TOKENS = 512


class PipelineFolder:
    """`folder` holds transformer, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2 and scheduler.

    image_encoder: the folder of the router's image encoder; by default `folder`/clip_vision, if there is one.
    Raises UserError for a missing part or a config that this project can't run.
    """

    def __init__(self, folder: str | Path, image_encoder: str | Path | None = None):
        self.folder = Path(folder)
        if missing := [part for part in PARTS if not (self.folder / part).is_dir()]:
            raise UserError(f"{self.folder} has no folder {', '.join(missing)}; give a FLUX.1 Kontext pipeline in "
                            f"diffusers' layout, which holds {', '.join(PARTS)}")
        self.flux_config = FluxConfig.from_json(read_json(self.folder / "transformer" / "config.json"))
        self.vae_config = VAEConfig.from_json(read_json(self.folder / "vae" / "config.json"))
        self.t5_config = T5Config.from_json(read_json(self.folder / "text_encoder_2" / "config.json"))
        self.schedule = Schedule.from_json(read_json(self.folder / "scheduler" / "scheduler_config.json"))
        beside = self.folder / "clip_vision"
        self.encoder_folder = Path(image_encoder) if image_encoder else (beside if beside.is_dir() else None)
        self.encoder: ImageEncoderFolder | None = (
            open_image_encoder(self.encoder_folder) if self.encoder_folder else None)

    @property
    def text_tokens(self) -> int:
        """t, the length that T5 instructions are padded to."""
        return min(MAX_TEXT_TOKENS, load_t5_tokenizer(str(self.folder / "tokenizer_2")).model_max_length)

    def token_ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """int32 CLIP ids [b, 77] and T5 ids [b, t]."""
        return (tokenize_clip(texts, self.folder / "tokenizer"),
                tokenize_t5(texts, self.folder / "tokenizer_2", self.text_tokens))

    def make(self, rngs: nnx.Rngs, basis: BasisConfig | None = None, *, dtype=jnp.float32, remat: str = "none",
             attention: str = "xla", unroll: int = 1) -> AnalogyModel:
        """The model with fresh weights; `basis.query_dim` None takes the image encoder's width. May be traced."""
        from lorweb_jax.encoders.clip import ClipText, text_config  # transformers takes seconds to import

        encoder = self.encoder.make(rngs) if self.encoder else None
        made = None
        if basis is not None:
            made = Basis(self.complete(basis, encoder), block_linears(self.flux_config), rngs=rngs)
        return AnalogyModel(
            transformer=Flux(self.flux_config, remat=remat, attention=attention, unroll=unroll, rngs=rngs),
            vae=AutoencoderKL(self.vae_config, rngs=rngs),
            text_encoder=ClipText(text_config(self.folder / "text_encoder"), rngs=rngs),
            text_encoder_2=T5Encoder(self.t5_config, rngs=rngs),
            image_encoder=encoder, basis=made, processor=self.encoder.processor if self.encoder else None, dtype=dtype)

    def complete(self, basis: BasisConfig, encoder: nnx.Module | None) -> BasisConfig:
        """The config with the query's width filled in; UserError if the image encoder's differs, or there is none."""
        if basis.query != "external":
            return basis
        if encoder is None:
            raise UserError(f"the basis asks an image encoder ({basis.encoder}), but {self.folder} has no clip_vision "
                            "folder; name the encoder's folder with image_encoder")
        width = queries.query_dim(basis.query_mode, encoder)
        if basis.query_dim not in (None, width):
            raise UserError(f"the basis expects a query {basis.query_dim} wide, and {self.encoder_folder} gives "
                            f"{width} in the mode {basis.query_mode}; name the image encoder it was trained with")
        return dataclasses.replace(basis, query_dim=width)

    def read(self) -> dict[str, np.ndarray]:
        """Every frozen weight by its path in the model, in the files' dtypes."""
        from lorweb_jax.encoders.clip import read_clip_text

        parts = {"transformer": lambda: load_transformer(self.folder / "transformer")[1],
                 "vae": lambda: load_vae(self.folder / "vae")[1],
                 "text_encoder": lambda: read_clip_text(self.folder / "text_encoder")[1],
                 "text_encoder_2": lambda: read_t5(self.folder / "text_encoder_2")[1]}
        if self.encoder:
            parts["image_encoder"] = self.encoder.read
        return {f"{part}.{path}": array for part, read in parts.items() for path, array in read().items()}

