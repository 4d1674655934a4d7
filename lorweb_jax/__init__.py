"""Visual analogy editing in JAX: show it a → a′ and b, and it makes b′.

`Pipeline`, `Mix`, `Style`, `read_image` and `write_image` are what a notebook needs; see lorweb_jax.pipeline.pipeline.
"""

import importlib

from lorweb_jax.processes.compiler_flags import set_cpu_flags

__version__ = "0.1.0"

_PUBLIC = {
    "Pipeline": "lorweb_jax.pipeline.pipeline",
    "Basis": "lorweb_jax.adapters.basis",
    "BasisConfig": "lorweb_jax.adapters.config",
    "Mix": "lorweb_jax.adapters.mix",
    "Style": "lorweb_jax.pipeline.styles",
    "UserError": "lorweb_jax.common.errors",
    "read_image": "lorweb_jax.images.io",
    "write_image": "lorweb_jax.images.io",
}
__all__ = list(_PUBLIC)

set_cpu_flags()


def __getattr__(name: str):
    # On demand, so that --help and a misspelt flag needn't wait for jax.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'lorweb_jax' has no attribute {name!r}")
