"""Floating-point operations of a traced program: matrix products and convolutions, loop bodies times their length."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr


def matrix_flops(jaxpr: Jaxpr, loops: bool = True) -> int:
    """Return the floating-point operations of all devices together; a multiplication with its addition counts as two.

    With `loops` False, every loop body counts once, as in the compiler's cost analysis. Of a conditional, the branch
    with the most work counts.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shape(equation.invars[0])
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(_shape(equation.outvars[0])) * math.prod(kernel) // features
        else:
            inner = [matrix_flops(part, loops) for part in _inner(params)]
            devices = params["mesh"].size if name == "shard_map" else 1  # whose body is what one device does
            once = max(inner, default=0) if name == "cond" else sum(inner)
            total += once * devices * _turns(name, params, loops)
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _turns(name: str, params: dict[str, Any], loops: bool) -> int:
    if name == "scan" and loops:
        return int(params["length"])
    if name == "pallas_call":  # its grid is not a loop of the program: the compiler sees one operation
        return math.prod(int(size) for size in params["grid_mapping"].grid)
    return 1


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part
