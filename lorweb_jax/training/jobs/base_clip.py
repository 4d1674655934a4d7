"""Trains the small base's CLIP pair: images of drawings against captions, and edits against instructions.

Two contrastive losses. An image, plain or after an operation, belongs to its caption ("rose in gray") among all
captions of the batch, which show the same drawing after other operations too; so the embedding must tell both the
drawing and the operation. And E(edited) − E(plain) belongs to the instruction ("make it gray") among all
instructions, so that the difference of two embeddings tells the edit, which is what the router asks of it.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.data.drawings import Drawings, load_drawings
from lorweb_jax.data.operations import OPERATIONS, all_sentences, on_white
from lorweb_jax.encoders.clip import ClipText, ClipVision, CLIPTextConfig, CLIPVisionConfig, save_clip
from lorweb_jax.encoders.processor import FILE, ImageProcessor
from lorweb_jax.encoders.small_tokenizers import CLIP_TOKENS, train_small_tokenizers
from lorweb_jax.encoders.tokenizers import tokenize_clip
from lorweb_jax.layers import Linear, Weight
from lorweb_jax.weights.safetensors_io import write_json

# CLIP's own statistics: transformers' defaults.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHARPEST = np.log(100.0)


def make(config) -> "BaseClip":
    return BaseClip(config)


class ClipPair(nnx.Module):
    """Both towers, and what only their training needs: the text projection and the temperatures' logarithms."""

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.vision = ClipVision(vision, rngs=rngs)
        self.text = ClipText(text, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, vision.projection_dim, bias=False, rngs=rngs)
        self.log_scales = Weight(jnp.full((2,), np.log(1 / 0.07), jnp.float32))     # captions, instructions

    def texts(self, ids: jax.Array) -> jax.Array:
        """ids int [b, t] -> unit vectors [b, p]."""
        return unit(self.text_projection(self.text(ids)))

    def scales(self) -> jax.Array:
        return jnp.exp(jnp.minimum(self.log_scales[...], SHARPEST))


def trimmed(ids: np.ndarray, end: int) -> np.ndarray:
    """ids [..., t] without the trailing tokens that are padding in all: the pooled output stays the same."""
    return ids[..., :int((ids == end).argmax(-1).max()) + 1]


def joined(first: np.ndarray, second: np.ndarray, end: int) -> np.ndarray:
    """Ids of every sentence of `first` [m, t] followed by every one of `second` [n, t]: [m, n, t], cut at t."""
    ids = np.repeat(first[:, None], len(second), 1)
    for row, length in zip(ids, (first == end).argmax(-1)):
        row[:, length:] = second[:, 1:first.shape[1] - length + 1]
    return ids


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis, for x much longer than 0.1. An operation that leaves a drawing as it is (a ball
    flipped) makes a difference of exactly 0: it stays 0, with a gradient that is not huge."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-2)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over rows of −log softmax(logits)[label]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


@dataclass
class Captioned:
    """Endless batches of drawings, each plain and after `edits` different operations.

    {"images": uint8 [b, 1+e, h, w, 3], "captions": int32 [b, 1+e, t], "operations": int32 [b, e]}; a batch depends on
    the seed and its number only, which is the position that is saved.
    """

    drawings: Drawings
    captions: np.ndarray               # int32 [drawings, 1 + operations, t]
    batch: int
    edits: int
    seed: int
    position: int = 0

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        effects = [on_white, *(operation.apply for operation in OPERATIONS.values())]
        # Drawings of one batch differ: two equal captions would be each other's wrong answer.
        drawings = rng.choice(len(self.drawings), self.batch, replace=False)
        chosen = np.stack([[0, *rng.choice(len(OPERATIONS), self.edits, replace=False) + 1] for _ in drawings])
        images = [[effects[effect](self.drawings.images[drawing]) for effect in row]
                  for drawing, row in zip(drawings, chosen)]
        return {"images": np.array(images), "captions": self.captions[drawings[:, None], chosen],
                "operations": (chosen[:, 1:] - 1).astype(np.int32)}

    def get_state(self) -> dict[str, int]:
        return {"batches": self.position}

    def set_state(self, state: dict[str, int]) -> None:
        self.position = state["batches"]


class BaseClip:
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        self.config = config
        self.drawings = load_drawings(config.data.cache, config.vision.image_size)
        self.train_drawings = self.drawings.part(held_out=False)
        operations = list(OPERATIONS.values())
        self.families = list(dict.fromkeys(operation.family for operation in operations))
        self.family_of = np.array([self.families.index(operation.family) for operation in operations])
        instructions = {operation.family: operation.instruction for operation in operations}
        with tempfile.TemporaryDirectory() as folder:
            clip_words, _ = self._tokenizers(Path(folder))

            def ids(texts: list[str]) -> np.ndarray:
                return tokenize_clip(texts, Path(folder) / "tokenizer")

            # [drawings, 1 + operations, t], [operations, 2, t] and [families, t]
            # "rose in gray": the ids of a sentence are those of its words, so 80,000 captions need not be tokenized.
            self.captions = trimmed(joined(ids(self.train_drawings.names), ids(
                ["", *(operation.describe for operation in operations)]), clip_words - 1), clip_words - 1)
            self.specific = trimmed(np.stack([ids(operation.specific) for operation in operations]), clip_words - 1)
            self.vague = trimmed(ids([instructions[family] for family in self.families]), clip_words - 1)
        self.vision_config = CLIPVisionConfig(**config.vision, hidden_act="quick_gelu")
        self.text_config = CLIPTextConfig(
            **config.text, hidden_act="quick_gelu", vocab_size=clip_words, max_position_embeddings=CLIP_TOKENS,
            projection_dim=config.vision.projection_dim, bos_token_id=clip_words - 2, eos_token_id=clip_words - 1,
            pad_token_id=clip_words - 1)
        size = config.vision.image_size
        self.processor = ImageProcessor(MEAN, STD, shortest_edge=size, crop=(size, size))

    def _tokenizers(self, folder: Path) -> tuple[int, int]:
        return train_small_tokenizers(self.train_drawings.names, all_sentences(), folder,
                                      t5_tokens=self.config.data.instruction_tokens)

    def build(self, rngs: nnx.Rngs) -> ClipPair:
        return ClipPair(self.vision_config, self.text_config, rngs=rngs)

    def data(self, config) -> Captioned:
        return Captioned(self.train_drawings, self.captions, config.train.batch, config.data.edits, config.seed)

    def loss(self, model, batch, key):
        images, captions = (batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("images", "captions"))
        wording = jax.random.randint(key, (len(self.specific),), 0, 2)
        specific = jnp.asarray(self.specific)[jnp.arange(len(self.specific)), wording]
        captions, specific, vague = (model.texts(ids) for ids in (captions, specific, jnp.asarray(self.vague)))
        embeddings = model.vision(self.processor.normalised(images))
        caption_scale, instruction_scale = model.scales()

        logits = caption_scale * unit(embeddings) @ captions.T
        own = jnp.arange(len(logits))
        per_drawing = embeddings.reshape(*batch["images"].shape[:2], -1)
        edits = unit(per_drawing[:, 1:] - per_drawing[:, :1]).reshape(-1, embeddings.shape[-1])
        operations = batch["operations"].reshape(-1)
        told = instruction_scale * edits @ specific.T
        parts = {
            "caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2,
            "operation": cross_entropy(told, operations),
            "family": cross_entropy(instruction_scale * edits @ vague.T, jnp.asarray(self.family_of)[operations])}
        loss = sum(self.config.loss[name] * value for name, value in parts.items())
        return loss, parts | {"captions_right": (logits.argmax(1) == own).mean(),
                              "operations_right": (told.argmax(1) == operations).mean()}

    def show(self, model, step: int) -> dict[str, np.ndarray]:
        """How often each operation (row) on held-out drawings is taken for which (column): white is always."""
        from lorweb_jax.training.jobs.clip_quality import told_operations

        return {"operations": np.repeat(np.repeat(np.repeat(
            (told_operations(self, model, drawings=40) * 255).astype(np.uint8)[..., None], 3, 2), 4, 0), 4, 1)}

    def finish(self, model, workdir: Path) -> None:
        """Writes the four folders of a pipeline that come from here, float16, and `workdir`/quality.json."""
        from lorweb_jax.training.jobs.clip_quality import quality

        save_clip(model.vision, workdir / "clip_vision", np.float16)
        save_clip(model.text, workdir / "text_encoder", np.float16)
        write_json(workdir / "clip_vision" / FILE, self.processor.to_json())
        self._tokenizers(workdir)
        measured = quality(self, model)
        write_json(workdir / "quality.json", measured)
        print(json.dumps(measured, indent=1))
