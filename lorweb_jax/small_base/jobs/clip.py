"""Trains the small base's CLIP pair: images of drawings against captions, and edits against instructions.

Three contrastive losses match an image, plain or after an operation, with its caption ("red apple in noto style", "red
apple in gray") among all captions of the batch, which include other operations on the same drawing, so that the
embedding encodes drawing, style and operation; E(edited) − E(plain) with the instruction ("make it gray", "draw it in
noto style") among all instructions, so that the difference of two embeddings encodes the edit, as the router needs it;
and a plain image with its kind ("a fruit") among all kinds.
"""

import operator
import tempfile
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, DrawingSets, load_sets, with_article
from lorweb_jax.data.embedded.operations import OPERATIONS, STYLES, on_white
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.models.clip.folder import ClipText, CLIPTextConfig, ClipVision, CLIPVisionConfig, save_clip
from lorweb_jax.models.image_encoder.processor import FILE, ImageProcessor
from lorweb_jax.models.tokenizers.folder import tokenize_clip
from lorweb_jax.nn.layers import Linear, Weight
from lorweb_jax.small_base.tokenizers import CLIP_TOKENS, train_small_tokenizers
from lorweb_jax.training.job import Job, NumberedBatches

# CLIP's own statistics: transformers' defaults.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SHARPEST = np.log(100.0)
# An edit is an operation, or the same sign in another set's style: what instructions tell apart, in this order.
EDITS = [*OPERATIONS.values(), *STYLES.values()]
FAMILIES = list(dict.fromkeys(edit.instruction for edit in EDITS))
FAMILY_OF = np.array([FAMILIES.index(edit.instruction) for edit in EDITS])
# What follows a name in a caption: an edit's description, or for a photograph as it is, the last row.
DESCRIPTIONS = [*(edit.describe for edit in EDITS), "in a photograph"]
NEEDS_SHAPE = np.array([operation.needs_shape for operation in OPERATIONS.values()])
STYLE_SETS = np.array([SETS.index(name) for name in STYLES])


def make(config) -> "BaseClip":
    return BaseClip(config)


class ClipPair(nnx.Module):
    """Both towers, with the text projection and log temperatures, which only training needs."""

    def __init__(self, vision: CLIPVisionConfig, text: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.vision = ClipVision(vision, rngs=rngs)
        self.text = ClipText(text, rngs=rngs)
        self.text_projection = Linear(text.hidden_size, vision.projection_dim, bias=False, role="any", rngs=rngs)
        # of captions, instructions and kinds
        self.log_scales = Weight(jnp.full((3,), np.log(1 / 0.07), jnp.float32))

    def texts(self, ids: jax.Array) -> jax.Array:
        """ids int [b, t] -> unit vectors [b, p]."""
        return unit(self.text_projection(self.text(ids)))

    def scales(self) -> jax.Array:
        return jnp.exp(jnp.minimum(self.log_scales[...], SHARPEST))


class Sentences(NamedTuple):
    """Token ids int32, padded with the end token, and which name and kind each drawing has."""

    names: Any  # [names, t]
    descriptions: Any  # [descriptions, t]
    specific: Any  # [edits, 2, t]
    vague: Any  # [families, t]
    kinds: Any  # [kinds, t]
    name_of: Any  # [D] row of names
    kind_of: Any  # [D] row of kinds
    words: int  # in the vocabulary; the end token is the last


def make_sentences(drawings: DrawingSets) -> Sentences:
    """The sentences of all drawings, with a tokenizer of every word in them; the text tower is dropped later."""
    names = sorted(set(drawings.names))
    kinds = [drawings.kind(i) if of != PHOTOGRAPH else "photograph" for i, of in enumerate(drawings.set_of)]
    kind_names = sorted(set(kinds))
    kind_texts = [with_article(kind) for kind in kind_names]
    texts = [*DESCRIPTIONS, *kind_texts, *(s for edit in EDITS for s in (edit.instruction, *edit.specific))]
    with tempfile.TemporaryDirectory() as folder:
        words, _ = train_small_tokenizers(names, texts, folder, t5_tokens=CLIP_TOKENS)

        def ids(texts: list[str]) -> np.ndarray:
            return trimmed(tokenize_clip(texts, Path(folder) / "tokenizer"), words - 1)

        return Sentences(
            ids(names),
            ids(DESCRIPTIONS),
            ids([s for edit in EDITS for s in edit.specific]).reshape(len(EDITS), 2, -1),
            ids(FAMILIES),
            ids(kind_texts),
            np.array([names.index(name) for name in drawings.names], np.int32),
            np.array([kind_names.index(kind) for kind in kinds], np.int32),
            words,
        )


def trimmed(ids: np.ndarray, end: int) -> np.ndarray:
    """ids [..., t] without the trailing tokens that are padding in all: the pooled output stays the same."""
    return ids[..., : int((ids == end).argmax(-1).max()) + 1]


def joined(first, second, end: int) -> jax.Array:
    """Ids of each sentence of `first` [m, t] followed by that of `second` [m, u]: [m, t + u − 2].

    The ids of a sentence are those of its words, so no caption need be tokenized as a whole.
    """
    first, second = jnp.asarray(first), jnp.asarray(second)
    length = (first == end).argmax(-1)[:, None]
    place = jnp.arange(first.shape[1] + second.shape[1] - 2)[None]
    padded = jnp.pad(first, ((0, 0), (0, second.shape[1] - 2)), constant_values=end)
    after = jnp.take_along_axis(second, jnp.clip(place - length + 1, 1, second.shape[1] - 1), 1)
    return jnp.where(place < length, padded, after)


def unit(x: jax.Array) -> jax.Array:
    """x / sqrt(|x|² + 0.01) over the last axis: about x / |x| where |x| is much larger than 0.1. The difference of an
    operation that leaves a drawing unchanged (a ball flipped) is exactly 0: it stays 0, with a bounded gradient."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-2)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over rows of −log softmax(logits)[label]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


class Choice(NamedTuple):
    """Which drawings a batch shows, [b], and which edits of each, [b, e]."""

    drawing: Any
    edits: Any


def choose(key: jax.Array, candidates: Any, set_of: Any, twins: Any, batch: int, edits: int) -> tuple[Any, Choice]:
    """(places in `candidates` [b], Choice): each drawing with `edits` operations that suit it, the last of them a style
    where it has a twin in the one that is drawn. set_of [D] and twins [D, sets] are DrawingSets'."""
    drawing_key, operation_key, style_key = jax.random.split(key, 3)
    row = jax.random.randint(drawing_key, (batch,), 0, len(candidates))
    drawing = jnp.asarray(candidates)[row]
    own = jnp.asarray(set_of)[drawing]
    drawn = jax.random.uniform(operation_key, (batch, edits))
    suits = jnp.asarray(np.flatnonzero(~NEEDS_SHAPE))
    chosen = jnp.where(
        (own == PHOTOGRAPH)[:, None],
        suits[(drawn * len(suits)).astype(jnp.int32)],
        (drawn * len(OPERATIONS)).astype(jnp.int32),
    )
    style = jax.random.randint(style_key, (batch,), 0, len(STYLES))
    goal = jnp.asarray(STYLE_SETS)[style]
    has_twin = (jnp.asarray(twins)[drawing, goal] >= 0) & (goal != own)
    return row, Choice(drawing, chosen.at[:, -1].set(jnp.where(has_twin, len(OPERATIONS) + style, chosen[:, -1])))


@dataclass
class Edited(NumberedBatches):
    """Endless batches of drawings, each plain and after `edits` different edits.

    {"images": uint8 [b, 1+e, h, w, 3], "drawing": int32 [b], "edits": int32 [b, e]}; a batch depends on the seed and
    its number only, which is the position that is saved.
    """

    drawings: DrawingSets
    batch: int
    edits: int
    seed: int
    position: int = 0

    def __post_init__(self):
        candidates = np.flatnonzero(~self.drawings.held_out)
        self._choose = jax.jit(
            lambda key: choose(key, candidates, self.drawings.set_of, self.drawings.twins, self.batch, self.edits)[1]
        )

    def at(self, number: int) -> dict[str, np.ndarray]:
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        drawing, edits = (np.asarray(array) for array in self._choose(key))
        images = [
            [on_white(self.drawings.images[d]), *(edited(self.drawings, d, edit) for edit in row)]
            for d, row in zip(drawing, edits)
        ]
        return {"images": np.array(images), "drawing": drawing.astype(np.int32), "edits": edits.astype(np.int32)}


def edited(drawings: DrawingSets, drawing: int, edit: int) -> np.ndarray:
    """uint8 [h, w, 3]: the drawing after edit number `edit`."""
    if edit < len(OPERATIONS):
        return list(OPERATIONS.values())[edit].apply(drawings.images[drawing])
    return on_white(drawings.images[drawings.twins[drawing, STYLE_SETS[edit - len(OPERATIONS)]]])


def pair_loss(
    model: ClipPair,
    batch: dict[str, jax.Array],
    sentences: Sentences,
    set_of: Any,
    processor: ImageProcessor,
    weights: Any,
    key: jax.Array,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss, metrics) of a batch as of `Edited`; set_of [D] is the drawings'; `dtype` is what the images' tower
    computes in."""
    drawing, edits = batch["drawing"], batch["edits"]
    (b, e), end = edits.shape, sentences.words - 1
    # As it is, a drawing is described by its style.
    styles = np.full(len(SETS), len(EDITS))
    styles[STYLE_SETS] = len(OPERATIONS) + np.arange(len(STYLES))
    described = jnp.concatenate([jnp.asarray(styles)[jnp.asarray(set_of)[drawing]][:, None], edits], 1).reshape(-1)
    name = jnp.repeat(jnp.asarray(sentences.name_of)[drawing], 1 + e)
    wording = jax.random.randint(key, (len(EDITS),), 0, 2)
    captions, specific, vague, kinds = texts(
        model,
        end,
        joined(jnp.asarray(sentences.names)[name], jnp.asarray(sentences.descriptions)[described], end),
        jnp.asarray(sentences.specific)[jnp.arange(len(EDITS)), wording],
        sentences.vague,
        sentences.kinds,
    )
    images = batch["images"].reshape(-1, *batch["images"].shape[2:])
    embeddings = model.vision(processor.normalised(images).astype(dtype)).astype(jnp.float32)
    caption_scale, edit_scale, kind_scale = model.scales()

    logits = caption_scale * unit(embeddings) @ captions.T
    own = jnp.arange(len(logits))
    # Equal captions are not each other's wrong answer.
    caption = name * len(DESCRIPTIONS) + described
    logits = jnp.where((caption[:, None] == caption) & (own[:, None] != own), -1e9, logits)
    per_drawing = embeddings.reshape(b, 1 + e, -1)
    differences = unit(per_drawing[:, 1:] - per_drawing[:, :1]).reshape(b * e, -1)
    edits = edits.reshape(-1)
    edit_logits = edit_scale * differences @ specific.T
    parts = {
        "caption": (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2,
        "edit": cross_entropy(edit_logits, edits),
        "family": cross_entropy(edit_scale * differences @ vague.T, jnp.asarray(FAMILY_OF)[edits]),
        "kind": cross_entropy(kind_scale * unit(per_drawing[:, 0]) @ kinds.T, jnp.asarray(sentences.kind_of)[drawing]),
    }
    loss = reduce(operator.add, [weights[name] * value for name, value in parts.items()])
    return loss, parts | {
        "captions_right": (logits.argmax(1) == own).mean(),
        "edits_right": (edit_logits.argmax(1) == edits).mean(),
    }


def texts(model: ClipPair, end: int, *ids: Any) -> list[jax.Array]:
    """model.texts of several arrays [·, t] of their own t, all in one call."""
    longest = max(part.shape[1] for part in ids)
    padded = [jnp.pad(jnp.asarray(part), ((0, 0), (0, longest - part.shape[1])), constant_values=end) for part in ids]
    return jnp.split(model.texts(jnp.concatenate(padded)), np.cumsum([len(part) for part in ids])[:-1])


def tower_configs(config, words: int) -> tuple[CLIPVisionConfig, CLIPTextConfig]:
    """Of a config of this job, and a vocabulary of `words` words that ends with the end token."""
    return CLIPVisionConfig(**config.vision), CLIPTextConfig(
        **config.text,
        vocab_size=words,
        max_position_embeddings=CLIP_TOKENS,
        projection_dim=config.vision["projection_dim"],
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
    )


def image_processor(size: int) -> ImageProcessor:
    return ImageProcessor(MEAN, STD, shortest_edge=size, crop=(size, size))


class BaseClip(Job):
    """See training/job.py for what each method is for."""

    trainable = Weight

    def __init__(self, config):
        self.config = config
        self.drawings = load_sets(config.data.drawings)
        self.sentences = make_sentences(self.drawings)
        self.vision_config, self.text_config = tower_configs(config, self.sentences.words)
        self.processor = image_processor(config.vision.image_size)

    def build(self, rngs: nnx.Rngs) -> ClipPair:
        return ClipPair(self.vision_config, self.text_config, rngs=rngs)

    def data(self, config) -> Edited:
        return Edited(self.drawings, config.train.batch, config.data.edits, config.seed)

    def loss(self, model, batch, key):
        return pair_loss(model, batch, self.sentences, self.drawings.set_of, self.processor, self.config.loss, key)

    def log_images(self, model, step: int) -> dict[str, np.ndarray]:
        """Confusion matrix of operations (rows: the true one) on held-out drawings; white is 1."""
        from lorweb_jax.small_base.jobs.clip_quality import confused_operations

        return {
            "operations": np.repeat(
                np.repeat(
                    np.repeat((confused_operations(self, model, drawings=40) * 255).astype(np.uint8)[..., None], 3, 2),
                    4,
                    0,
                ),
                4,
                1,
            )
        }

    def finish(self, model, workdir: Path) -> None:
        """Writes clip_vision, a folder of the pipeline, in float16, and `workdir`/quality.json."""
        from lorweb_jax.small_base.jobs.clip_quality import write_quality

        save_clip(model.vision, workdir / "clip_vision", np.float16)
        write_json(workdir / "clip_vision" / FILE, self.processor.to_json())
        write_quality(workdir, model.vision, self.processor, self.drawings)
