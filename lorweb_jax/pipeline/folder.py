"""A FLUX Kontext pipeline folder in diffusers' layout: its configs now, its weights when they are asked for."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.adapters.basis import Basis, BasisConfig
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.hub_cache import PIPELINE_FILES, existing
from lorweb_jax.files.sharded_loading import load_sharded
from lorweb_jax.models.autoencoder.model import AutoencoderKL, VAEConfig
from lorweb_jax.models.backbone import Backbone, Linear
from lorweb_jax.models.clip.folder import ClipText, open_clip_text, text_config
from lorweb_jax.models.flux1.config import FluxConfig
from lorweb_jax.models.flux1.model import Flux
from lorweb_jax.models.flux1.record import backbone
from lorweb_jax.models.image_encoder import queries
from lorweb_jax.models.image_encoder.encoder import ImageEncoderFolder, existing_encoder, open_image_encoder
from lorweb_jax.models.image_encoder.identity import require_same
from lorweb_jax.models.t5.model import T5Config, T5Encoder, open_t5
from lorweb_jax.models.tokenizers.folder import (
    TextTokenizer,
    load_clip_tokenizer,
    load_t5_tokenizer,
    tokenize_clip,
    tokenize_t5,
)
from lorweb_jax.pipeline.model import AnalogyModel
from lorweb_jax.pipeline.pretrained import open_model

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
# The model's frozen parts; a use may leave out those that it doesn't need.
MODEL_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "image_encoder")
# T5 instructions are padded to this in FLUX; a pipeline whose tokenizer says less was trained with less.
MAX_TEXT_TOKENS = 512
_REMEDY = "give a FLUX.1 Kontext pipeline in diffusers' layout"


def model_layers(pipeline: str | Path) -> dict[str, Linear]:
    """The layers that adapters may change, by path, of the transformer in a pipeline's folder; only its config.json is
    read. UserError where there is none."""
    folder = existing(pipeline, PIPELINE_FILES, "the folder of the base model", ("transformer",))
    path = folder / "transformer/config.json"
    return backbone(FluxConfig.from_json(read_json(path), path)).adapted


class PipelineFolder:
    """`folder` holds transformer, vae, text_encoder, text_encoder_2, tokenizer, tokenizer_2 and scheduler.

    image_encoder: the folder of the router's image encoder; by default `folder`/clip_vision, if there is one. Both may
    be Hub names too (hub_cache.py).
    Raises UserError for a missing part or a config that this project can't run.
    """

    def __init__(self, folder: str | Path, image_encoder: str | Path | None = None):
        self.folder = existing(folder, PIPELINE_FILES, "the folder of a FLUX.1 Kontext pipeline", PARTS)
        self._told: set[str] = set()  # texts that `tell_left_out` has seen
        if missing := [part for part in PARTS if not (self.folder / part).is_dir()]:
            raise UserError(
                f"{self.folder} has no folder {', '.join(missing)}; give a FLUX.1 Kontext pipeline in "
                f"diffusers' layout, which holds {', '.join(PARTS)}"
            )
        self.flux_config = self._read(FluxConfig, "transformer")
        self.vae_config = self._read(VAEConfig, "vae")
        self.t5_config = self._read(T5Config, "text_encoder_2")
        self.schedule = self._read(self.backbone.schedule, "scheduler", "scheduler_config.json")
        self._require_widths()
        beside = self.folder / "clip_vision"
        self.encoder_folder = existing_encoder(image_encoder) if image_encoder else beside if beside.is_dir() else None
        self.encoder: ImageEncoderFolder | None = (
            open_image_encoder(self.encoder_folder) if self.encoder_folder else None
        )

    def _read(self, kind: type, part: str, name: str = "config.json") -> Any:
        path = self.folder / part / name
        return kind.from_json(read_json(path, remedy=_REMEDY), path)

    def _require_widths(self) -> None:
        """UserError for parts of different pipelines."""
        flux, text = self.flux_config, self.clip_text_config()
        for part, name, width, field, expected in (
            ("vae", "latent_channels", 4 * self.vae_config.latent_channels, "in_channels", flux.in_channels),
            ("text_encoder_2", "d_model", self.t5_config.d_model, "joint_attention_dim", flux.joint_attention_dim),
            ("text_encoder", "hidden_size", text.hidden_size, "pooled_projection_dim", flux.pooled_projection_dim),
        ):
            if width != expected:
                raise UserError(
                    f"{self.folder / part} gives the transformer {width} values a token ({name}), but "
                    f"transformer/config.json has {field} {expected}; take all parts from one pipeline"
                )

    @property
    def backbone(self) -> Backbone:
        """The record of its transformer."""
        return backbone(self.flux_config)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of the stacks of blocks, in the model, that offloading leaves in the host's memory: nearly all of the
        transformer's and T5's weights."""
        return (*(f"transformer.{path}" for path, depth in self.backbone.stacks if depth), "text_encoder_2.block")

    @property
    def text_tokens(self) -> int:
        """t, the length that T5 instructions are padded to."""
        return min(MAX_TEXT_TOKENS, load_t5_tokenizer(str(self.folder / "tokenizer_2")).max_length)

    def clip_text_config(self):
        """CLIPTextConfig of the pooled text encoder."""
        return text_config(self.folder / "text_encoder")

    def token_ids(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """int32 CLIP ids [b, 77] and T5 ids [b, t]."""
        ids = (
            tokenize_clip(texts, self.folder / "tokenizer"),
            tokenize_t5(texts, self.folder / "tokenizer_2", self.text_tokens),
        )
        # Beyond a table of embeddings, jax would silently take its last row.
        clip = self.clip_text_config()
        if ids[0].shape[1] > clip.max_position_embeddings:
            raise UserError(
                f"{self.folder / 'tokenizer'} gives {ids[0].shape[1]} tokens a text, but text_encoder takes "
                f"{clip.max_position_embeddings}; take both from one pipeline"
            )
        for numbers, part, config in zip(ids, ("tokenizer", "tokenizer_2"), (clip, self.t5_config)):
            if numbers.size and numbers.max() >= config.vocab_size:
                raise UserError(
                    f"{self.folder / part} gives the number {numbers.max()}, but its text encoder knows "
                    f"{config.vocab_size} tokens; take both from one pipeline"
                )
        return ids

    def tell_left_out(self, texts: Iterable[str], name: str) -> None:
        """Say in one line which of the texts (such as the "prompt") an encoder doesn't take to the end; each once."""
        texts = [text for text in dict.fromkeys(texts) if text not in self._told]
        self._told.update(texts)
        longer, first = set(), {}
        for encoder, tokenizer, tokens in self._text_encoders():
            for text in texts:
                if rest := tokenizer.left_out(text, tokens):
                    longer.add(text)
                    first.setdefault(encoder, f"after {encoder}'s {tokens} tokens {_shortened(rest)}")
        if longer:
            where = " and ".join(first.values())
            if len(texts) == 1:
                say(f"the {name} is longer than the text encoders take: {where} is left out")
            else:
                say(
                    f"{len(longer):,} of {len(texts):,} {name}s are longer than the text encoders take: "
                    f"{where} is left out of the first of them"
                )

    def _text_encoders(self) -> Iterator[tuple[str, TextTokenizer, int]]:
        """(name, tokenizer, tokens that it takes) of each."""
        clip = load_clip_tokenizer(str(self.folder / "tokenizer"))
        yield "CLIP", clip, clip.max_length
        yield "T5", load_t5_tokenizer(str(self.folder / "tokenizer_2")), self.text_tokens

    def make(
        self,
        rngs: nnx.Rngs,
        basis: BasisConfig | None = None,
        *,
        dtype=jnp.float32,
        remat: str = "none",
        attention: str = "xla",
        unroll: int = 1,
        quantization: str = "none",
        parts: Collection[str] = MODEL_PARTS,
    ) -> AnalogyModel:
        """The model with fresh weights; `basis.query_dim` None takes the image encoder's width. May be traced.

        parts: those of MODEL_PARTS that it has; the others are None. The other options are Flux's.
        """
        # Built even if it is left out: its width is the query's, and the keys of later parts are drawn after its own.
        encoder = self.encoder.make(rngs) if self.encoder else None
        adapters = Basis(self.complete(basis, encoder), self.backbone.adapted, rngs=rngs) if basis else None
        makers = {
            "transformer": lambda: Flux(
                self.flux_config, remat=remat, attention=attention, unroll=unroll, quantization=quantization, rngs=rngs
            ),
            "vae": lambda: AutoencoderKL(self.vae_config, rngs=rngs),
            "text_encoder": lambda: ClipText(self.clip_text_config(), rngs=rngs),
            "text_encoder_2": lambda: T5Encoder(self.t5_config, rngs=rngs),
            "image_encoder": lambda: encoder,
        }
        return AnalogyModel(
            backbone=self.backbone,
            **{name: make() if name in parts else None for name, make in makers.items()},
            basis=adapters,
            processor=self.encoder.processor if self.encoder else None,
            dtype=dtype,
        )

    def complete(self, basis: BasisConfig, encoder: nnx.Module | None) -> BasisConfig:
        """The config with the query's width filled in; UserError if the image encoder's differs, or there is none."""
        if not basis.coefficients.from_images:
            return basis
        if encoder is None:
            named = f" ({basis.encoder})" if basis.encoder else ""
            raise UserError(
                f"the basis asks an image encoder{named}, but {self.folder} has no clip_vision folder; name "
                "the encoder's folder with image_encoder"
            )
        width = queries.query_dim(basis.query_mode, encoder)
        if basis.query_dim not in (None, width):
            raise UserError(
                f"the basis expects a query {basis.query_dim} wide, and {self.encoder_folder} gives "
                f"{width} in the mode {basis.query_mode}; name the image encoder it was trained with"
            )
        return dataclasses.replace(basis, query_dim=width)

    def require_encoder(self, basis: BasisConfig) -> None:
        """UserError where the basis says which image encoder it was trained with, and it isn't this folder's."""
        if basis.coefficients.from_images and basis.encoder_sketch:
            require_same(basis.encoder_sketch, self.encoder_folder, basis.encoder)

    def read(self, shapes: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, Any]:
        """Frozen weights by their path in the model.

        shapes: of those to read, with dtype and sharding: each device reads its own share (see load_sharded), and parts
        of the pipeline of which nothing is to be read are not opened. None: all, as arrays of this host in the files'
        dtypes.
        """
        parts = {
            "transformer": lambda: open_model(self.folder / "transformer", "transformer")[1],
            "vae": lambda: open_model(self.folder / "vae", "vae")[1],
            "text_encoder": lambda: open_clip_text(self.folder / "text_encoder")[1],
            "text_encoder_2": lambda: open_t5(self.folder / "text_encoder_2")[1],
        }
        if self.encoder:
            parts["image_encoder"] = self.encoder.open
        weights: dict[str, Any] = {}
        for part, open_part in parts.items():
            if shapes is None:
                arrays = open_part().load()
            else:
                targets = {
                    path.removeprefix(f"{part}."): shape
                    for path, shape in shapes.items()
                    if path.startswith(f"{part}.")
                }
                arrays = load_sharded(open_part(), targets) if targets else {}
            weights |= {f"{part}.{path}": array for path, array in arrays.items()}
        return weights


def _shortened(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[: longest - 1] + "…")
