"""A model's parameters as a flat dict {dotted path: array}, and a model from such a dict; strict both ways."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from lorweb_jax.common.errors import UserError

M = TypeVar("M", bound=nnx.Module)
_LISTED = 8  # differences named in a message before the rest is only counted


def flat_state(module: nnx.Module, only: Any = nnx.Not(nnx.RngState)) -> dict[str, jax.Array]:
    """{dotted path: array} of the module's Variables that the NNX filter `only` takes (all but random keys)."""
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(nnx.state(module, only))}


def shapes(make: Callable[[], nnx.Module], only: Any = nnx.Not(nnx.RngState)) -> dict[str, jax.ShapeDtypeStruct]:
    """{dotted path: shape and dtype} of the module that `make()` returns, without allocating it."""
    return abstract_shapes(nnx.eval_shape(make), only)


def abstract_shapes(module: nnx.Module, only: Any = nnx.Not(nnx.RngState)) -> dict[str, jax.ShapeDtypeStruct]:
    """The same of a module that nnx.eval_shape made."""
    return {
        _dotted(path): jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        for path, variable in nnx.to_flat_state(nnx.state(module, only))
    }


def build(make: Callable[[], M], flat: Mapping[str, Any], what: str = "the weights") -> M:
    """The module that `make()` returns, holding exactly `flat`'s arrays in `flat`'s dtypes; nothing is initialised.

    jax arrays, sharded or not, are used as they are. Raises UserError with the differences if a
    path is missing, is not the model's, or has another shape.
    """
    return fill(nnx.eval_shape(make), flat, what)


def fill(module: M, flat: Mapping[str, Any], what: str = "the weights") -> M:
    """The same from a module that nnx.eval_shape made; a whole pipeline takes seconds to trace."""
    graphdef, state = nnx.split(module)
    variables = [(_dotted(path), variable) for path, variable in nnx.to_flat_state(state)]
    require_equal(
        {path: array.shape for path, array in flat.items()},
        {path: variable.shape for path, variable in variables},
        what,
    )
    leaves = [variable.replace(jnp.asarray(flat[path])) for path, variable in variables]
    structure = jax.tree.structure(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    return nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))


def differences(actual: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]]) -> list[str]:
    """One line per name: "- name" missing, "+ name" not expected, "± name" of another shape. Shapes by name."""
    lines = [f"- {name} {list(expected[name])}: missing" for name in expected if name not in actual]
    lines += [f"+ {name} {list(actual[name])}: not expected" for name in actual if name not in expected]
    lines += [
        f"± {name}: found {list(actual[name])}, expected {list(expected[name])}"
        for name in expected
        if name in actual and tuple(actual[name]) != tuple(expected[name])
    ]
    return lines


def require_equal(actual: Mapping[str, Iterable[int]], expected: Mapping[str, Iterable[int]], what: str) -> None:
    """Raises UserError that lists the first differences, if there are any."""
    lines = differences(actual, expected)
    if lines:
        rest = [f"… and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        raise UserError(
            "\n  ".join(
                [
                    f"{what} does not fit the model in {len(lines)} places (− missing, + not "
                    "expected, ± other shape); check that file and config belong together",
                    *(line.replace("- ", "− ", 1) for line in lines[:_LISTED]),
                    *rest,
                ]
            )
        )


def _dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)
