"""Counts the FLOPs of the matrix products and convolutions in a traced function."""

import math
from collections.abc import Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

_LARGEST_WINDOW = 16  # of a layer's convolution; a larger one is an image


def count(jaxpr: Jaxpr | ClosedJaxpr, tile: int = 1) -> int:
    """Returns the FLOPs of one call; a multiply-add is two. Features are padded to a multiple of `tile`.

    Pallas kernels count with their declared cost estimate, `shard_map` with the FLOPs of one device. A `scan` counts
    all its iterations, a `while_loop` one; a `cond` counts its most expensive branch. Functions named "recomputed_…",
    which a gradient recomputes, do not count.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of(equation, tile) for equation in jaxpr.eqns)


def _of(equation: JaxprEqn, tile: int) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = _shape(equation.invars[0])
        padding = _padding(_shape(equation.outvars[0])[-1:], tile)
        inner = math.prod(shape[axis] for axis in contracted)
        return round(2 * _size(equation.outvars[0]) * inner * padding * _padding((inner,), tile))
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        out_features = kernel[params["dimension_numbers"].rhs_spec[0]]
        # a dilated input, as in the gradient of a strided convolution, is mostly zeros; their products do not count
        zeros = math.prod(params["lhs_dilation"])
        numbers = params["dimension_numbers"]
        # in the gradient of a kernel, the window is the image, and what else are input channels are the images
        summed = kernel[numbers.rhs_spec[1]]
        of_kernel = math.prod(kernel[axis] for axis in numbers.rhs_spec[2:]) > _LARGEST_WINDOW
        other = _shape(equation.outvars[0])[numbers.out_spec[0]] if of_kernel else summed
        padding = _padding((out_features, other), tile)
        return round(2 * _size(equation.outvars[0]) * math.prod(kernel) // out_features // zeros * padding)
    if name == "pallas_call" and params.get("cost_estimate"):
        return params["cost_estimate"].flops
    if str(params.get("name", "")).startswith("recomputed_"):
        return 0
    inner = [count(jaxpr, tile) for jaxpr in jaxprs_in_params(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _size(variable: Any) -> int:
    return math.prod(_shape(variable))


def _padding(features: Sequence[int], tile: int) -> float:
    """Returns the factor by which padding enlarges these axes."""
    return math.prod(-(-size // tile) * tile / size for size in features)
