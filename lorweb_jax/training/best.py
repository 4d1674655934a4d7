"""The best checkpoint of a run by a held-out score: best.json says which, best/ has what the job keeps of it."""

import math
from pathlib import Path

from flax import nnx

from lorweb_jax.common.outputs import replacing_folder
from lorweb_jax.common.schema import read_json
from lorweb_jax.files.safetensors_io import write_json
from lorweb_jax.training.job import Job

FILE, FOLDER = "best.json", "best"


def mark_best(workdir: Path, job: Job, model: nnx.Module, step: int) -> float | None:
    """The job's score of the checkpoint of this step, None without one; if it is the best of the run so far, what the
    job keeps of it replaces what lies in best/. A score that isn't finite is never the best."""
    score = job.validate(model, step)
    if score is None:
        return None
    best = read_json(workdir / FILE) if (workdir / FILE).exists() else {}
    if score < best.get("score", math.inf):  # neither NaN nor infinity is
        with replacing_folder(workdir / FOLDER) as folder:
            job.keep(model, folder)
        write_json(workdir / FILE, {"step": step, "score": score})
    return score
