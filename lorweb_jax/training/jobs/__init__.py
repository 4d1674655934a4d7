"""The training jobs by the name that `config.job` gives them. A job's module is imported when it is asked for."""

import importlib

from lorweb_jax.errors import UserError
from lorweb_jax.training.job import Job

JOBS = {
    "basis": "lorweb_jax.training.jobs.basis:make",
    "base_vae": "lorweb_jax.training.jobs.base_vae:make",
    "base_clip": "lorweb_jax.training.jobs.base_clip:make",
    "base_transformer": "lorweb_jax.training.jobs.base_transformer:make",
}


def make_job(config) -> Job:
    """The job named by `config.job`: one of JOBS, or an import path `package.module:function`."""
    path = JOBS.get(config.job, config.job)
    module, _, function = path.partition(":")
    if not function:
        raise UserError(f"config.job is {config.job!r}; it must be one of {', '.join(JOBS)} "
                        "or an import path package.module:function")
    return getattr(importlib.import_module(module), function)(config)
