"""Makes the records that are missing: images batch by batch, then their scores, then what a router chose."""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lorweb_jax.common import fingerprint
from lorweb_jax.common.errors import UserError, say
from lorweb_jax.common.outputs import write_file
from lorweb_jax.evaluation.memory import peak_bytes, reset_peak
from lorweb_jax.evaluation.methods import Candidate
from lorweb_jax.evaluation.records import MethodRecords, Records
from lorweb_jax.evaluation.routing import read_coefficients
from lorweb_jax.evaluation.samples import Sample, batches
from lorweb_jax.evaluation.scores import AlexNet, Score
from lorweb_jax.images.io import write_image
from lorweb_jax.pipeline.folder import PARTS
from lorweb_jax.pipeline.pipeline import Pipeline

COEFFICIENTS, EDITS, PATH = "coefficients.npz", "edits.npz", "path.png"
BLENDS = 7  # pictures from one analogy's mix to another's, both included
AT_ONCE = 64  # records whose images are in memory while they are scored


def conditions(
    pipeline: Pipeline,
    *,
    steps: int,
    guidance: float,
    seed: int,
    max_size: int | None = None,
    dtype: str = "float32",
    quantization: str = "none",
    round_to_bfloat16: bool = False,
) -> dict[str, Any]:
    """What all records of a folder have in common beside their triplets: `Records.begin` refuses others.

    max_size: longest edge of the grid, px; None: no limit. dtype: what the transformer computes in. The others as
    Pipeline takes them; a folder's setup names them where they aren't the default.
    """
    base = fingerprint.of_folders(pipeline.folder.folder / name for name in PARTS)
    common = {"steps": steps, "guidance": guidance, "seed": seed, "max_size": max_size, "dtype": dtype, "base": base}
    if quantization != "none":
        common["quantization"] = quantization
    if round_to_bfloat16:
        common["round_to_bfloat16"] = True
    return common


def make_images(
    records: Records,
    method: Candidate,
    samples: Sequence[Sample],
    *,
    seed: int = 0,
    batch: int = 16,
    tell: Callable[[str], None] = say,
) -> MethodRecords:
    """The images of those samples that have no record yet, each written as soon as its batch is done.

    A sample's noise depends on `seed` and the sample alone: neither on the batch nor on what was there before.
    """
    kept = records.method(method.name, method.describe())
    there = kept.read()
    samples = [sample for sample in samples if method.kind != "truth" or sample.b2 is not None]
    missing = [sample for sample in samples if sample.id not in there]
    if missing:
        tell(f"{method.name}: {len(missing)} of {len(samples)} images to make")
    sizes = set()
    reset_peak()
    for chosen, padded in batches([sample.b for sample in missing], batch):
        rows = [missing[i] for i in padded]
        size = rows[0].b.shape
        began = time.perf_counter()
        seeds = [(seed + sample.noise_seed) % 2**64 for sample in rows]
        images = method.make(rows, seeds)
        seconds = (time.perf_counter() - began) / len(rows)
        compiled = size not in sizes and method.kind not in ("copy", "truth")
        cost = {"seconds": seconds, "compiled": compiled, "peak_bytes": peak_bytes(), "batch": len(rows)}
        sizes.add(size)
        for sample, row_seed, image in zip(rows[: len(chosen)], seeds, images):
            if image.shape != sample.b.shape:
                raise UserError(f"{method.name} made an image {image.shape} of {sample.id}, not {sample.b.shape}")
            kept.write(sample.id, image, row_seed, cost | {"device": jax.devices()[0].device_kind})
    return kept


def add_scores(kept: MethodRecords, samples: Mapping[str, Sample], scores: Sequence[Score]) -> None:
    """Those of `scores` that the method's records lack, computed from the stored images.

    samples: by id. Raises UserError where a record's image was damaged, and where a score of another source is there.
    """
    there = {key: record for key, record in kept.read().items() if key in samples}
    for record in there.values():
        for score in scores:
            source = record.get("sources", {}).get(score.name, score.source)
            if score.name in record["scores"] and source != score.source:
                raise UserError(
                    f"{score.name} of {kept.name!r} was computed with other weights ({source}, and {score.source} "
                    "now); give the same image encoder, or another --out"
                )
    todo = [key for key, record in there.items() if any(score.name not in record["scores"] for score in scores)]
    for start in range(0, len(todo), AT_ONCE):
        keys = todo[start : start + AT_ONCE]
        images = [kept.image(key, there[key]) for key in keys]
        for score in scores:
            absent = [i for i, key in enumerate(keys) if score.name not in there[key]["scores"]]
            values = score([samples[keys[i]] for i in absent], [images[i] for i in absent]) if absent else []
            for i, value in zip(absent, values):
                there[keys[i]]["scores"][score.name] = value
                there[keys[i]].setdefault("sources", {})[score.name] = score.source
        for key in keys:
            kept.update(key, there[key])


def add_coefficients(kept: MethodRecords, method: Candidate, samples: Sequence[Sample], batch: int = 16) -> None:
    """coefficients.npz: "ids" [b], and what the router chose, by path [b, l, n]; unless it is there."""
    path = kept.folder / COEFFICIENTS
    if method.route is None or path.exists():
        return
    rows: dict[str, list[np.ndarray]] = {}
    ids: list[str] = []
    for chosen, padded in batches([sample.b for sample in samples], batch):
        for name, c in method.route([samples[i] for i in padded]).items():
            rows.setdefault(name, []).append(np.moveaxis(c, 1, 0)[: len(chosen)])
        ids += [samples[i].id for i in chosen]
    _write(path, ids=np.array(ids), **{name: np.concatenate(parts) for name, parts in rows.items()})


def add_edits(records: Records, samples: Sequence[Sample]) -> None:
    """edits.npz: "ids" [b], and "directions" [b, p], what the edit a → a′ of each triplet changes as AlexNet sees it;
    unless it is there."""
    path = records.folder / EDITS
    if not path.exists():
        before, after = (AlexNet().embed([getattr(sample, part) for sample in samples]) for part in ("a", "a2"))
        _write(path, ids=np.array([sample.id for sample in samples]), directions=after - before)


def add_path(kept: MethodRecords, method: Candidate, samples: Sequence[Sample], seed: int = 0) -> None:
    """path.png: b of one analogy and what becomes of it by BLENDS mixes, from its own coefficients to those of the
    analogy whose are farthest from them; unless it is there. The analogy is the first of the last split."""
    path, stored = kept.folder / PATH, kept.folder / COEFFICIENTS
    if method.blend is None or path.exists() or not stored.exists():
        return
    coefficients, ids = read_coefficients(stored, {sample.id: sample.task for sample in samples})
    sample = next(each for each in samples if each.split == samples[-1].split)
    row = ids.index(sample.id)
    squares = [np.square(c - c[row]).sum((1, 2)) for c in coefficients.values()]
    far = np.sum(squares, axis=0).argmax()
    blends = [
        {name: (1 - t) * c[row] + t * c[far] for name, c in coefficients.items()} for t in np.linspace(0, 1, BLENDS)
    ]
    images = method.blend(sample, blends, (seed + sample.noise_seed) % 2**64)
    write_image(path, np.concatenate([sample.b, *images], 1))


def _write(path: Path, **arrays: Any) -> None:
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    write_file(path, data.getvalue())
