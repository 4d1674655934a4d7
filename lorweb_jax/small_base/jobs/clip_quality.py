"""How well the small CLIP's image embedding distinguishes operations and drawings that training never showed.

Only the vision tower is used, as by the router: an operation is recognised by the direction in which the embedding
moves, compared with the mean direction of each operation on training drawings.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lorweb_jax.data.embedded.bulk import operated_chunk
from lorweb_jax.data.embedded.drawing_sets import PHOTOGRAPH, SETS, DrawingSets
from lorweb_jax.data.embedded.operations import OPERATIONS
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.models.image_encoder.processor import ImageProcessor
from lorweb_jax.nn.sharding import to_host

BATCH = 256
NAMES = list(OPERATIONS)
FAMILIES = list(dict.fromkeys(operation.family for operation in OPERATIONS.values()))
FAMILY_OF = np.array([FAMILIES.index(operation.family) for operation in OPERATIONS.values()])
NEEDS_SHAPE = np.array([operation.needs_shape for operation in OPERATIONS.values()])


def embeddings(vision: nnx.Module, processor: ImageProcessor, drawings: DrawingSets) -> np.ndarray:
    """float32 [drawings, 1 + operations, p]: each drawing plain, then after every operation."""
    embed = jax.jit(lambda vision, x: vision(processor.normalised(x)))
    chunks = []
    for start in range(0, len(drawings), 16):
        images = operated_chunk(drawings.images[start : start + 16], ["", *NAMES])
        flat = images.reshape(-1, *images.shape[2:])
        padded = np.concatenate([flat, flat[: -len(flat) % BATCH]])  # one compilation
        rows = np.concatenate([to_host(embed(vision, padded[i : i + BATCH])) for i in range(0, len(padded), BATCH)])
        chunks.append(rows[: len(flat)].reshape(*images.shape[:2], -1))
    return np.concatenate(chunks)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


def directions(x: np.ndarray) -> np.ndarray:
    """[drawings, 1 + operations, p] -> unit vectors [drawings, operations, p] in which each edit moves a drawing."""
    return unit(x[:, 1:] - x[:, :1])


def nearest_operations(x: np.ndarray, prototypes: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """int [drawings, operations]: which operation's prototype [operations, p] each edit's direction is nearest to."""
    return np.where(allowed, directions(x) @ prototypes.T, -np.inf).argmax(-1)


def sample(drawings: DrawingSets, of: int, held_out: bool, count: int) -> DrawingSets:
    """Up to `count` drawings of one set, always the same."""
    indices = np.flatnonzero((drawings.set_of == of) & (drawings.held_out == held_out))
    return drawings.chosen(np.random.default_rng(0).permutation(indices)[:count])


def confused_operations(job, model, drawings: int) -> np.ndarray:
    """[operations, operations]: the share of held-out drawings on which an operation (row) is taken for another."""
    train, held_out = (
        embeddings(model.vision, job.processor, sample(job.drawings, 0, part, drawings)) for part in (False, True)
    )
    nearest = nearest_operations(held_out, unit(directions(train).mean(0)), np.ones(len(NAMES), bool))
    return np.stack([np.bincount(column, minlength=len(NAMES)) for column in nearest.T]) / len(nearest)


def probe(train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Whether ridge regression on features [drawings, operations, f] recognises each operation of `held_out`: bool."""
    mean, deviation = train.mean((0, 1)), train.std((0, 1)) + 1e-6

    def features(x):
        x = ((x - mean) / deviation).reshape(-1, x.shape[-1])
        return np.concatenate([x, np.ones((len(x), 1), np.float32)], 1).astype(np.float64)

    operations = train.shape[1]
    x = features(train)
    targets = np.tile(np.eye(operations), (len(train), 1))
    weights = np.linalg.solve(x.T @ x + 1e-3 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return (features(held_out) @ weights).reshape(-1, operations, operations).argmax(-1) == np.arange(operations)


def quality(
    vision: nnx.Module, processor: ImageProcessor, drawings: DrawingSets, *, train: int = 120, held_out: int = 60
) -> dict:
    """Shares of right answers on held-out drawings of each set (chance: 1 in the number of answers).

    Prototypes are the mean directions on `train` training drawings, spread over the sets of drawings.
    """
    result: dict[str, Any] = {"operations": len(NAMES), "families": len(FAMILIES)}
    sets = range(len(SETS) - 1)
    trained = np.concatenate(
        [embeddings(vision, processor, sample(drawings, of, False, train // len(sets))) for of in sets]
    )
    prototypes = unit(directions(trained).mean(0))
    family_prototypes = unit(np.stack([prototypes[FAMILY_OF == f].sum(0) for f in range(len(FAMILIES))]))
    right_by_family = []
    for of, name in enumerate(SETS):
        part = sample(drawings, of, True, held_out)
        x = embeddings(vision, processor, part)
        allowed = ~NEEDS_SHAPE if of == PHOTOGRAPH else np.ones(len(NAMES), bool)
        right = (nearest_operations(x, prototypes, allowed) == np.arange(len(NAMES)))[:, allowed]
        family = (directions(x) @ family_prototypes.T).argmax(-1) == FAMILY_OF
        plain = unit(x[:, 0])
        drawing = (unit(x[:, 1:]) @ plain.T).argmax(-1) == np.arange(len(plain))[:, None]
        result[name] = {
            "held_out": len(part),
            "operation_from_difference": share(right),
            "family_from_difference": share(family[:, allowed]),
        }
        if of != PHOTOGRAPH:
            result[name] |= {
                "operation_linear_probe_of_difference": share(probe(directions(trained), directions(x))),
                "drawing_of_an_edited_image": share(drawing),
            }
            right_by_family.append(right.mean(0))
    by_operation = np.mean(right_by_family, 0)
    result["operation_from_difference_by_family"] = {
        family: share(by_operation[FAMILY_OF == f]) for f, family in enumerate(FAMILIES)
    }
    result["root_mean_square_of_embedding"] = share(np.sqrt(np.square(trained).mean()))
    return result


def share(x) -> float:
    return round(float(np.mean(x)), 3)


def write_quality(folder: Path, vision: nnx.Module, processor: ImageProcessor, drawings: DrawingSets) -> None:
    """Write and print `folder`/quality.json of a trained tower."""
    measured = quality(vision, processor, drawings)
    write_json(folder / "quality.json", measured)
    print(json.dumps(measured, indent=1))
