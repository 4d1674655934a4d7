"""The small base measured on held-out drawings: edits by instruction, text to image, reconstruction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from lorweb_jax.common.errors import UserError
from lorweb_jax.common.progress import progress_bar
from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, STYLE_WORDS, DrawingSets, with_article
from lorweb_jax.data.embedded.operations import LAST_ONLY, OPERATIONS, STYLES, on_white
from lorweb_jax.evaluation.lpips import lpips
from lorweb_jax.images.levels import to_float, to_uint8
from lorweb_jax.pipeline.pipeline import Pipeline

STYLE = "style"
# An edit that hardly changes a drawing (a ball turned over) can't be told from copying it: mean difference, levels.
LEAST_CHANGE = 3.0
# Kinds that are told from each other: what most people would call them.
KINDS = (
    "face",
    "hand",
    "worker",
    "athlete",
    "mammal",
    "bird",
    "insect",
    "sea animal",
    "fruit",
    "vegetable",
    "meal",
    "drink",
    "building",
    "car",
    "aircraft",
    "garment",
    "flag",
    "clock",
    "heart",
    "instrument",
)


class Edit(NamedTuple):
    """One edit of a held-out image b; `others` are the drawings in the places of a and a′, unedited as b is."""

    family: str
    set_of: int
    prompt: str
    others: tuple[np.ndarray, np.ndarray]
    b: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Result:
    """The result of one edit and its distances to the truth, beside those of b itself ("copy")."""

    edit: Edit
    image: np.ndarray
    mse: float
    mse_of_copy: float
    lpips: float
    lpips_of_copy: float


def families() -> list[str]:
    return [*dict.fromkeys(operation.family for operation in OPERATIONS.values()), STYLE]


def choose_edits(drawings: DrawingSets, per_cell: int, seed: int = 0) -> list[Edit]:
    """`per_cell` edits of held-out images for each family and set (fewer where operations don't suit photographs). A
    family's parameters take turns, and so do the specific wordings of each instruction."""
    random, edits = np.random.default_rng(seed), []
    for of in range(len(SETS)):
        indices = np.flatnonzero(drawings.held_out & (drawings.set_of == of))
        for family in families() if len(indices) else ():
            edits += _cell(drawings, indices, of, family, per_cell, random)
    return edits


def _cell(drawings, indices, of, family, count, random) -> list[Edit]:
    if family == STYLE:
        goals = [(name, style.specific) for name, style in STYLES.items() if SETS.index(name) != of]
    else:
        goals = [
            (name, operation.specific)
            for name, operation in OPERATIONS.items()
            if operation.family == family and not (operation.needs_shape and of == PHOTOGRAPH)
        ]
    if not goals or (family == STYLE and of == PHOTOGRAPH):
        return []
    edits = []
    for _ in range(10 * count):
        if len(edits) == count:
            break
        name, sentences = goals[len(edits) % len(goals)]
        index, first, second = random.choice(indices, 3, replace=len(indices) < 3)
        rgba = drawings.images[index]
        if family == STYLE:
            twin = drawings.twins[index, SETS.index(name)]
            truth = on_white(drawings.images[twin]) if twin >= 0 else on_white(rgba)
        else:
            truth = OPERATIONS[name].apply(rgba)
        b = on_white(rgba)
        if np.abs(truth.astype(int) - b).mean() < LEAST_CHANGE:
            continue
        sentence = sentences[len(edits) // len(goals) % 2]
        others = on_white(drawings.images[first]), on_white(drawings.images[second])
        edits.append(Edit(family, of, LAST_ONLY.format(sentence), others, b, truth))
    return edits


def measure_edits(
    pipeline: Pipeline, edits: Sequence[Edit], *, steps: int, guidance: float = 2.5, seed: int = 0, batch: int = 64
) -> list[Result]:
    """Each edit by `Pipeline.edit_batch`: a canvas of four drawings, with an instruction to change the last."""
    results, batch = [], min(batch, len(edits))
    with progress_bar("edits", len(edits), 0, seconds=30.0, unit=" edits") as bar:
        for start in range(0, len(edits), batch):
            part = list(edits[start : start + batch])
            padded = part + part[:1] * (batch - len(part))  # one compilation
            results += pipeline.edit_batch(
                [(*edit.others, edit.b) for edit in padded],
                [edit.prompt for edit in padded],
                steps=steps,
                guidance=guidance,
                seed=seed + start,
            )[: len(part)]
            bar.update(len(part))
    truth, b = (np.stack([getattr(edit, name) for edit in edits]) for name in ("truth", "b"))
    near, far = _distances(np.stack(results), truth), _distances(b, truth)
    return [
        Result(edit, image, float(near[0][i]), float(far[0][i]), float(near[1][i]), float(far[1][i]))
        for i, (edit, image) in enumerate(zip(edits, results))
    ]


def _distances(x: np.ndarray, y: np.ndarray, batch: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """(MSE of pixels as 0..1, LPIPS) of uint8 images [n, h, w, 3]."""
    batch = min(batch, len(x))
    squared = np.square((x.astype(np.float32) - y) / 255).mean((1, 2, 3))
    padded = [np.concatenate([images, images[:1].repeat(-len(images) % batch, 0)]) for images in (x, y)]
    return squared, np.concatenate(
        [lpips(*(images[i : i + batch] for images in padded)) for i in range(0, len(padded[0]), batch)]
    )[: len(x)]


def share_nearer(results: Sequence[Result], measure: str) -> float:
    """The share of results that are nearer to the truth than b is; `measure` is "mse" or "lpips"."""
    return float(np.mean([getattr(result, measure) < getattr(result, f"{measure}_of_copy") for result in results]))


# Text to image


def draw(
    pipeline: Pipeline,
    captions: Sequence[str],
    side: int,
    *,
    steps: int,
    guidance: float = 2.5,
    cfg: float = 1.0,
    seed: int = 0,
    batch: int = 50,
    noise: np.ndarray | None = None,
) -> list[np.ndarray]:
    """An image uint8 [side, side, 3] for each caption, without a condition image, with classifier-free guidance `cfg`
    (1: none). The noise of the i-th picture depends on the seed and i alone, unless `noise` [captions, s, c] gives
    it."""
    batch, latents = min(batch, len(captions)), _latents(pipeline, side)
    if noise is None:
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(captions))]
        noise = np.stack([jax.random.normal(key, latents) for key in keys])
    images: list[np.ndarray] = []
    with progress_bar("drawings from text", len(captions), 0, seconds=30.0, unit=" drawings") as bar:
        for start in range(0, len(captions), batch):
            part = range(start, min(start + batch, len(captions)))
            padded = [*part, *[start] * (batch - len(part))]  # one compilation
            images += pipeline.generate_batch(
                [captions[i] for i in padded],
                size=(side, side),
                steps=steps,
                guidance=guidance,
                true_guidance=cfg,
                noise=noise[np.array(padded)],
            )[: len(part)]
            bar.update(len(part))
    return images


def _latents(pipeline: Pipeline, side: int) -> tuple[int, int]:
    """[s, c] of the packed latents of a picture."""
    vae = pipeline.folder.vae_config
    return (side // vae.downscale // 2) ** 2, 4 * vae.latent_channels


def kind_captions(per_kind_and_style: int) -> tuple[list[str], np.ndarray]:
    """Captions that name a kind and a style, and the number of each one's kind."""
    captions = [
        f"a drawing of {with_article(kind)} in {word} style"
        for kind in KINDS
        for word in STYLE_WORDS.values()
        for _ in range(per_kind_and_style)
    ]
    return captions, np.repeat(np.arange(len(KINDS)), len(STYLE_WORDS) * per_kind_and_style)


def kind_prototypes(pipeline: Pipeline, drawings: DrawingSets, most: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """(unit vectors [kinds, p] from the mean of all kinds to that of each, the mean [p] of all kinds), where a kind's
    mean is over unit embeddings of up to `most` training drawings."""
    random, means = np.random.default_rng(0), []
    for kind in KINDS:
        indices = [i for i in _drawn(drawings, held_out=False) if drawings.kind(i) == kind]
        chosen = random.permutation(indices)[:most]
        means.append(_unit(embed(pipeline, [on_white(drawings.images[i]) for i in chosen])).mean(0))
    mean = np.mean(means, 0)
    return _unit(np.stack(means) - mean), mean


def _drawn(drawings: DrawingSets, held_out: bool) -> np.ndarray:
    return np.flatnonzero((drawings.held_out == held_out) & (drawings.set_of != PHOTOGRAPH))


def nearest_kinds(
    pipeline: Pipeline, images: Sequence[np.ndarray], prototypes: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """int [n]: which kind's prototype each image's embedding is nearest to."""
    directions, mean = prototypes
    return (_unit(_unit(embed(pipeline, images)) - mean) @ directions.T).argmax(1)


def embed(pipeline: Pipeline, images: Sequence[np.ndarray], batch: int = 100) -> np.ndarray:
    encoder, embeddings, batch = pipeline.image_encoder, [], min(batch, len(images))
    if encoder is None:
        raise UserError("the pipeline has no image encoder to compare drawings with; give it a clip_vision folder")
    for start in range(0, len(images), batch):
        part = list(images[start : start + batch])
        embeddings.append(encoder.embed(part + part[:1] * (batch - len(part)))[: len(part)])
    return np.concatenate(embeddings)


def real_drawings_right(pipeline: Pipeline, drawings: DrawingSets, prototypes) -> float:
    """The share of held-out drawings of KINDS whose nearest kind is their own: a bound for images drawn from text."""
    indices = [i for i in _drawn(drawings, held_out=True) if drawings.kind(i) in KINDS]
    kinds = nearest_kinds(pipeline, [on_white(drawings.images[i]) for i in indices], prototypes)
    return float(np.mean(kinds == [KINDS.index(drawings.kind(i)) for i in indices]))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


# Reconstruction


def reconstructed(pipeline: Pipeline, images: np.ndarray, batch: int = 32) -> np.ndarray:
    """uint8 [n, h, w, 3] after the autoencoder."""
    batch = min(batch, len(images))
    padded = np.concatenate([images, images[:1].repeat(-len(images) % batch, 0)])
    return np.concatenate(
        [to_uint8(_reconstruct(pipeline.model.vae, padded[i : i + batch])) for i in range(0, len(padded), batch)]
    )[: len(images)]


@nnx.jit
def _reconstruct(vae, images):
    return vae.image(vae.latents(to_float(images)))


def psnr(result: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio, dB, of the squared error over all images."""
    error = np.square((result.astype(np.float64) - truth) / 255).mean()
    return float(-10 * np.log10(max(error, 1e-10)))
