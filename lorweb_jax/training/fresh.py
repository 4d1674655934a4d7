"""A fresh model's arrays, each by a small program traced from the initialisation, shared by all arrays alike.

Arrays that differ in nothing but their random key share a program. XLA compiles these few programs in a fraction of the
time that one program of all arrays takes, in which each random draw is compiled separately.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.extend

from lorweb_jax.nn import sharding

_SMALL = 64  # numbers; random keys, counts and the like are computed one by one, and handed to the programs


def arrays_of(
    make: Callable[[], dict[str, jax.Array]], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of `jax.jit(make)()`, to the bit, with the shardings of `shapes`."""
    traced = jax.make_jaxpr(make)()
    outputs = dict(zip(sorted(shapes), traced.jaxpr.outvars, strict=True))  # as jax orders a dict
    values: dict[Any, Any] = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    large = []
    for equation in _needed(traced.jaxpr.eqns, outputs.values()):
        if all(var.aval.size <= _SMALL for var in equation.outvars) and all(
            _is_literal(var) or var in values for var in equation.invars
        ):
            _compute(equation, values)
        else:
            large.append(equation)

    programs: dict[Any, Callable] = {}
    arrays = {}
    for name, output in outputs.items():
        if _is_literal(output) or output in values:
            arrays[name] = sharding.put(_value(output, values), shapes[name])
            continue
        equations = _needed(large, [output])
        inputs = list(
            dict.fromkeys(
                var for equation in equations for var in equation.invars if not _is_literal(var) and var in values
            )
        )
        program, arguments = _program(equations, inputs, output), [values[var] for var in inputs]
        where = shapes[name].sharding
        alike = str(jax.make_jaxpr(program)(*arguments)), where
        if alike not in programs:
            programs[alike] = jax.jit(program, out_shardings=where)
        arrays[name] = programs[alike](*arguments)
    return arrays


def _needed(equations: Sequence[Any], outputs: Iterable[Any]) -> list[Any]:
    """Those of the equations that the outputs depend on, in their order."""
    needed, kept = {var for var in outputs if not _is_literal(var)}, []
    for equation in reversed(equations):
        if needed & set(equation.outvars):
            kept.append(equation)
            needed.update(var for var in equation.invars if not _is_literal(var))
    return kept[::-1]


def _program(equations: Sequence[Any], inputs: Sequence[Any], output: Any) -> Callable[..., jax.Array]:
    def program(*arguments):
        values = dict(zip(inputs, arguments, strict=True))
        for equation in equations:
            _compute(equation, values)
        return values[output]

    return program


def _compute(equation: Any, values: dict[Any, Any]) -> None:
    """Adds the equation's results to `values`."""
    results = equation.primitive.bind(
        *(_value(var, values) for var in equation.invars), **equation.primitive.get_bind_params(equation.params)
    )
    values.update(zip(equation.outvars, results if equation.primitive.multiple_results else [results], strict=True))


def _value(var: Any, values: dict[Any, Any]) -> Any:
    return var.val if _is_literal(var) else values[var]


def _is_literal(var: Any) -> bool:
    return isinstance(var, jax.extend.core.Literal)
