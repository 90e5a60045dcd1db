"""Values that users pass to Python functions, converted in one place: what is plainly meant is taken (a steps of 4.0,
"4" or a NumPy integer), anything else is one UserError that names the argument."""

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

SEEDS = 2**64  # seeds are below
LARGEST = 10**100  # whole numbers are below: Python prints none of more than 4,300 digits


def whole(name: str, value: Any) -> int:
    """Returns a whole number as int: an integer of any library, 4.0 or "4". Raises UserError for others, and bool."""
    given = _scalar(value)
    is_plain = isinstance(given, str) or (isinstance(given, float) and given.is_integer())
    convert: Callable[[Any], int] = int if is_plain else operator.index
    if not isinstance(given, bool):
        with contextlib.suppress(TypeError, ValueError):
            if abs(found := convert(given)) < LARGEST:
                return found
    _refuse(name, value, "a whole number")


def wholes(name: str, value: Any) -> list[int]:
    """Returns whole numbers as a list, also of a single one. Raises UserError as `whole` does."""
    value = _scalar(value)
    if isinstance(value, str) or not _is_iterable(value):
        return [whole(name, value)]
    return [whole(f"{name}[{i}]", item) for i, item in enumerate(value)]


def number(name: str, value: Any) -> float:
    """Returns a number as float: of any library, or "7.5". Raises UserError for others, for bool, and for one that is
    not finite in float32."""
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
    """Returns a seed: a whole number in 0 … 2^64 - 1. Raises UserError for others."""
    found = whole("seed", value)
    if not 0 <= found < SEEDS:
        raise UserError(f"seed is {plain(found, 40)}; it must be in 0 … {SEEDS - 1}")
    return found


def text(name: str, value: Any) -> str:
    """Returns a text, also of UTF-8 bytes. Raises UserError for others, and for text that is no Unicode.

    A command line in another encoding than UTF-8 reaches Python as text with lone surrogates.
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
    """Returns texts as a list, also of a single one. Raises UserError as `text` does, and for a set or a mapping."""
    value = _scalar(value)
    if isinstance(value, (str, bytes, bytearray)):
        return [text(name, value)]
    if not _is_iterable(value):
        _refuse(name, value, "a text, or a list of texts")
    return [text(f"{name}[{i}]", item) for i, item in enumerate(value)]


def path(name: str, value: Any) -> str:
    """Returns a path, or the name of a model, as text. Raises UserError for what is neither text nor a path."""
    if isinstance(value, (str, os.PathLike)) and isinstance(found := os.fspath(value), str):
        return found
    _refuse(name, value, "a path")


def array(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns an array of real numbers as float32; raises UserError for anything else, or another shape."""
    try:
        found = value if isinstance(value, jax.Array) else np.asarray(value)
        real = jnp.issubdtype(found.dtype, jnp.floating) or jnp.issubdtype(found.dtype, jnp.integer)
    except (TypeError, ValueError, OverflowError):
        real = False
    if not real:
        _refuse(name, value, "an array of real numbers")
    if found.shape != shape:
        raise UserError(f"{name} has the shape {found.shape}; these prompts, steps and sizes need {shape} (NHWC)")
    with np.errstate(over="ignore"):  # becomes inf, which is found in what is sampled
        return jnp.asarray(found.astype(jnp.float32))


def _scalar(value: Any) -> Any:
    """Returns the Python value of a scalar of NumPy, JAX or torch; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (Mapping, Set, bytes, bytearray))


def _refuse(name: str, value: Any, supported: str) -> NoReturn:
    raise UserError(f"{name} is {_shown(value)}; supported: {supported}")


def _shown(value: Any) -> str:
    try:
        return plain(repr(value), 100)
    except Exception:  # of any class; of numbers with too many digits
        return f"of type {type(value).__name__}"
