"""Libraries that some layouts of data need and the package itself doesn't."""

import importlib
from types import ModuleType

from lorweb_jax.common.errors import UserError


def extra(module: str, name: str, purpose: str) -> ModuleType:
    """The module, imported now. UserError where the package isn't installed; `name`: of pyproject's extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{purpose}, the package {package} is needed, which can't be imported ({error}); pip install "
            f"'lorweb_jax[{name}]' or pip install {package}"
        ) from None
