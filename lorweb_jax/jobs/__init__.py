"""Training jobs by name, as in `config.job`. A job's module is imported only when the job is made."""

import importlib

from lorweb_jax.common.errors import UserError
from lorweb_jax.training.job import Job

JOBS = {
    "basis": "lorweb_jax.jobs.basis:make",
    "pair": "lorweb_jax.jobs.pair:make",
    "base_vae": "lorweb_jax.small_base.jobs.vae:make",
    "base_clip": "lorweb_jax.small_base.jobs.clip:make",
    "base_transformer": "lorweb_jax.small_base.jobs.transformer:make",
}


def make_job(config) -> Job:
    """The job named by `config.job`: one of JOBS, or an import path `package.module:function`. UserError if there
    is no such module or function."""
    module, _, name = JOBS.get(config.job, config.job).partition(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"config.job is {config.job!r}, but there is no module {error.name}; it must be one of "
                f"{', '.join(JOBS)}, or an import path package.module:function",
                2,
            ) from None
        raise
    if not callable(function):
        raise UserError(f"config.job is {config.job!r}, but {module} has no function {name}; name one of it", 2)
    return function(config)
