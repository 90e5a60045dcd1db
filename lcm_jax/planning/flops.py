"""Counts the FLOPs of the matrix products and convolutions in a traced function."""

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


def count(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Returns the FLOPs of one call; a multiply-add is two.

    Pallas kernels count with their declared cost estimate, `shard_map` with the FLOPs of one device. A `scan` counts
    all its iterations, a `while_loop` one; a `cond` counts its most expensive branch. Functions named "recomputed_…",
    which a gradient recomputes, do not count.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = _shape(equation.invars[0])
        return 2 * _size(equation.outvars[0]) * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        # a dilated input, as in the gradient of a strided convolution, is mostly zeros; their products do not count
        zeros = math.prod(params["lhs_dilation"])
        return 2 * _size(equation.outvars[0]) * math.prod(kernel) // out_features // zeros
    if name == "pallas_call" and params.get("cost_estimate"):
        return params["cost_estimate"].flops
    if str(params.get("name", "")).startswith("recomputed_"):
        return 0
    inner = [count(jaxpr) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))
