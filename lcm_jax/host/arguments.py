"""Converts arguments of the Python API. Unambiguous values are accepted (4.0, "4" or a NumPy integer for an integer);
anything else raises a UserError that names the argument."""

import contextlib
import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import UserError, plain

SEEDS = 2**64  # exclusive upper bound of seeds
LARGEST = 10**100  # exclusive upper bound of integers: Python does not print more than 4,300 digits


def whole(name: str, value: Any) -> int:
    """Converts an integer of any library, 4.0 or "4" to int. Raises UserError for other values, including bool."""
    given = _scalar(value)
    is_plain = isinstance(given, str) or (isinstance(given, float) and given.is_integer())
    convert: Callable[[Any], int] = int if is_plain else operator.index
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError, ValueError):
            if abs(found := convert(given)) < LARGEST:
                return found
    _refuse(name, value, "a whole number")


def wholes(name: str, value: Any) -> list[int]:
    """Converts one integer or several to a list of int. Raises UserError like `whole`."""
    value = _scalar(value)
    if isinstance(value, str) or not _is_iterable(value):
        return [whole(name, value)]
    return [whole(f"{name}[{i}]", item) for i, item in enumerate(value)]


def number(name: str, value: Any) -> float:
    """Converts a number of any library, or "7.5", to float. Raises UserError for other values, including bool and
    numbers that are not finite in float32."""
    given = _scalar(value)
    if not isinstance(given, (bool, bytes, bytearray)) and not getattr(given, "ndim", 0):
        try:
            found = float(given)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if abs(found) <= float(jnp.finfo(jnp.float32).max):
            return found
    _refuse(name, value, "a finite number")


def seed(value: Any) -> int:
    """Converts a seed to int. Raises UserError unless it is an integer in 0 … 2^64 - 1."""
    found = whole("seed", value)
    if not 0 <= found < SEEDS:
        raise UserError(f"seed is {plain(found, 40)}; it must be in 0 … {SEEDS - 1}")
    return found


def text(name: str, value: Any) -> str:
    """Converts a string or UTF-8 bytes to str. Raises UserError for other values and for invalid Unicode.

    A command line in an encoding other than UTF-8 reaches Python as text with lone surrogates.
    """
    found = _scalar(value)
    try:
        if isinstance(found, (bytes, bytearray)):
            return bytes(found).decode("utf-8")
        if isinstance(found, str):
            found.encode("utf-8")
            return str(found)
    except UnicodeError:
        raise UserError(f"{name} is {_shown(value)}, which is not UTF-8; give it in UTF-8") from None
    _refuse(name, value, "a text")


def texts(name: str, value: Any) -> list[str]:
    """Converts one text or several to a list of str. Raises UserError like `text`, and for a set or a mapping."""
    value = _scalar(value)
    if isinstance(value, (str, bytes, bytearray)):
        return [text(name, value)]
    if not _is_iterable(value):
        _refuse(name, value, "a text, or a list of texts")
    return [text(f"{name}[{i}]", item) for i, item in enumerate(value)]


def path(name: str, value: Any) -> str:
    """Converts a path or a model's name to str.

    Raises UserError unless it is a str or a PathLike of str, not empty and without a null character, which no file
    system allows.
    """
    found = os.fspath(value) if isinstance(value, (str, os.PathLike)) else ""
    if isinstance(found, str) and found and "\0" not in found:
        return found
    _refuse(name, value, "a path")


def array(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Converts an array of real numbers to float32. Raises UserError for other values and for another shape."""
    try:
        found = value if isinstance(value, jax.Array) else np.asarray(value)
        real = jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)
    except (TypeError, ValueError, OverflowError):
        real = False
    if not real:
        _refuse(name, value, "an array of real numbers")
    if found.shape != shape:
        raise UserError(f"{name} has the shape {found.shape}; these prompts, steps and sizes need {shape} (NHWC)")
    with np.errstate(over="ignore"):  # overflow gives inf, which is detected in the samples
        return jnp.asarray(found.astype(jnp.float32))


def _scalar(value: Any) -> Any:
    """Returns a NumPy, JAX or torch scalar as a Python value; other values unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (Mapping, Set, bytes, bytearray))


def _refuse(name: str, value: Any, supported: str) -> NoReturn:
    raise UserError(f"{name} is {_shown(value)}; supported: {supported}")


def _shown(value: Any) -> str:
    try:
        return plain(repr(value), 100)
    except Exception:  # repr of a foreign class may raise anything; so may an integer with too many digits
        return f"of type {type(value).__name__}"
