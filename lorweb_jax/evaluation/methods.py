"""The ways of making b′ that an evaluation compares, and the whole evaluation of one pipeline on some tasks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lorweb_jax.common.errors import UserError
from lorweb_jax.evaluation.evaluate import Method, Sample, batches, evaluate, rows_sheet
from lorweb_jax.evaluation.table import Table
from lorweb_jax.images.io import write_image
from lorweb_jax.pipeline.pipeline import Pipeline

COPY = "copy b"


def edit_samples(
    pipeline: Pipeline,
    samples: Sequence[Sample],
    *,
    steps: int,
    guidance: float,
    seed: int = 0,
    batch: int = 16,
    use_basis: bool = True,
) -> list[np.ndarray]:
    """b′ of every sample, `batch` at once, each from its caption and the noise of its position in the batch."""
    results: list[np.ndarray] = [samples[0].b] * len(samples)
    for chosen, padded in batches([sample.b for sample in samples], batch):
        images = pipeline.edit_batch(
            [samples[i].condition for i in padded],
            [samples[i].caption for i in padded],
            steps=steps,
            guidance=guidance,
            seed=seed,
            use_basis=use_basis,
        )
        for index, image in zip(chosen, images):
            results[index] = image
    return results


def methods(pipeline: Pipeline, **sampling) -> dict[str, Method]:
    """Copying b; the base without and with its basis, from the same noise. `sampling` as in `edit_samples`."""
    basis = pipeline.model.basis
    if basis is None:
        raise UserError("the pipeline has no basis to be evaluated; attach one first")
    name = "basis" if basis.config.coefficients.has_router else "LoRA"
    return {
        COPY: lambda samples: [sample.b for sample in samples],
        "base, text only": lambda samples: edit_samples(pipeline, samples, use_basis=False, **sampling),
        name: lambda samples: edit_samples(pipeline, samples, **sampling),
    }


def evaluate_pipeline(pipeline: Pipeline, samples: Sequence[Sample], out: Path, **sampling) -> Table:
    """Score copy, base and basis on the samples; write table.md, table.json and sheet.png into `out`."""
    table = evaluate(methods(pipeline, **sampling), samples, pipeline.image_encoder)
    table.write(out)
    results = {name: images for name, images in table.results.items() if name != COPY}  # b is shown as it is
    write_image(out / "sheet.png", rows_sheet(samples, results))
    return table
