"""What the small CLIP's image embedding tells of drawings it never saw."""

import jax
import numpy as np
from flax import nnx

from lorweb_jax.data.drawings import Drawings
from lorweb_jax.data.operations import OPERATIONS, on_white
from lorweb_jax.sharding import to_host

BATCH = 250


def embeddings(job, model: nnx.Module, drawings: Drawings) -> np.ndarray:
    """float32 [drawings, 1 + operations, p]: each drawing plain, then after every operation."""
    images = np.stack([effect(drawing) for drawing in drawings.images
                       for effect in (on_white, *(operation.apply for operation in OPERATIONS.values()))])
    embed = jax.jit(lambda vision, x: vision(job.processor.normalised(x)))
    padded = np.concatenate([images, images[:-len(images) % BATCH]])   # one compilation
    found = [to_host(embed(model.vision, padded[i:i + BATCH])) for i in range(0, len(padded), BATCH)]
    return np.concatenate(found)[:len(images)].reshape(len(drawings), 1 + len(OPERATIONS), -1)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def _told(job, model: nnx.Module, embeddings_dop: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which of the instructions `ids` fits E(edited) − E(plain) best: [drawings, operations]."""
    texts = to_host(jax.jit(lambda model, ids: model.texts(ids))(model, ids))
    return (_unit(embeddings_dop[:, 1:] - embeddings_dop[:, :1]) @ texts.T).argmax(-1)


def _part(drawings: Drawings, count: int) -> Drawings:
    return Drawings(drawings.names[:count], drawings.images[:count], drawings.held_out[:count])


def told_operations(job, model: nnx.Module, drawings: int) -> np.ndarray:
    """[operations, operations]: the share of held-out drawings on which an operation is taken for another."""
    found = embeddings(job, model, _part(job.drawings.part(held_out=True), drawings))
    told = _told(job, model, found, job.specific[:, 0])
    return np.stack([np.bincount(column, minlength=len(OPERATIONS)) for column in told.T]) / len(told)


def _probe(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Operations told by ridge regression on features [drawings, operations, f]: right or not, of `held_out`."""
    mean, deviation = train.mean((0, 1)), train.std((0, 1)) + 1e-6

    def features(x):
        x = ((x - mean) / deviation).reshape(-1, x.shape[-1])
        return np.concatenate([x, np.ones((len(x), 1), np.float32)], 1).astype(np.float64)

    operations = train.shape[1]
    x = features(train)
    targets = np.tile(np.eye(operations), (len(train), 1))
    weights = np.linalg.solve(x.T @ x + 1e-3 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return (features(held_out) @ weights).reshape(-1, operations, operations).argmax(-1) == np.arange(operations)


def quality(job, model: nnx.Module) -> dict:
    """Shares of right answers on held-out drawings after every operation (chance: 1 in the number of answers)."""
    held_out_drawings = job.drawings.part(held_out=True)
    train = embeddings(job, model, _part(job.train_drawings, 200))
    held_out = embeddings(job, model, held_out_drawings)
    operations = np.arange(len(OPERATIONS))
    told = _told(job, model, held_out, job.specific[:, 0])

    def pairs(x):
        return np.concatenate([np.broadcast_to(x[:, :1], x[:, 1:].shape), x[:, 1:]], -1)

    by_probe = _probe(train[:, 1:], held_out[:, 1:])
    by_pair = _probe(pairs(train), pairs(held_out))
    plain = _unit(held_out[:, 0])
    drawing = (_unit(held_out[:, 1:]) @ plain.T).argmax(-1) == np.arange(len(plain))[:, None]
    family_told = _told(job, model, held_out, job.vague)
    per_family = {family: round(float(by_pair[:, job.family_of == i].mean()), 3)
                  for i, family in enumerate(job.families)}
    return {
        "held_out_drawings": len(plain), "operations": len(operations), "families": len(job.families),
        "operation_from_difference_and_instruction": round(float((told == operations).mean()), 3),
        "family_from_difference_and_instruction": round(float((family_told == job.family_of).mean()), 3),
        "operation_linear_probe_edited_alone": round(float(by_probe.mean()), 3),
        "operation_linear_probe_before_and_after": round(float(by_pair.mean()), 3),
        "drawing_of_an_edited_image": round(float(drawing.mean()), 3),
        "root_mean_square_of_embedding": round(float(np.sqrt(np.square(held_out).mean())), 3),
        "linear_probe_by_family": per_family}
