"""The best checkpoint of a run by a held-out score: best.json says which, best/ has what the job keeps of it."""

import math
import shutil
from pathlib import Path

import jax
from flax import nnx

from lorweb_jax.common.schema import read_json
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.training.job import Job

FILE, FOLDER = "best.json", "best"


def mark_best(workdir: Path, job: Job, model: nnx.Module, step: int) -> float | None:
    """The job's score of the checkpoint of this step, None without one; if it is the best of the run so far, what the
    job keeps of it replaces what lies in best/. A score that isn't finite is never the best."""
    score = job.validate(model, step)
    if score is None or jax.process_index() > 0:
        return score
    best = read_json(workdir / FILE) if (workdir / FILE).exists() else {}
    if math.isfinite(score) and not score >= best.get("score", math.inf):
        partial = workdir / f".{FOLDER}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        job.keep(model, partial)
        shutil.rmtree(workdir / FOLDER, ignore_errors=True)
        partial.rename(workdir / FOLDER)
        write_json(workdir / FILE, {"step": step, "score": score})
    return score
