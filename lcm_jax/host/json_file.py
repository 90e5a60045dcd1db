"""Reads untrusted JSON objects, with limits on size and depth and type checks of the values.

The caller passes the types of the keys it uses, and gets a dict or a UserError that names the file, the key and the
value:

    read(path, {"beta_start": NUMBER, "trained_betas": or_none(LIST)})
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lcm_jax.errors import UserError, plain

LARGEST = 32 * 2**20  # bytes: ten times the largest JSON file of these models, a tokenizer; needs up to 1 GB to parse
DEEPEST = 64  # levels of nested brackets
CONFIG = 2**20  # bytes: the limit for a config; published ones have a few thousand
MOST_DIGITS = 100  # digits of one number


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of JSON value: its name in error messages and its test."""

    name: str
    test: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raises UserError, naming the key, unless the value is of this kind."""
        if not self.test(value):
            raise UserError(f"{plain(key, 100)} is {plain(repr(value), 100)}; supported: {self.name}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


NUMBER = Kind("a number", _is_number)
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
INTEGER = Kind("a whole number", _is_whole)
WHOLE = Kind("a positive whole number", lambda value: _is_whole(value) and 0 < value < 2**31)
BOOLEAN = Kind("true, false", lambda value: isinstance(value, bool))
TEXT = Kind("a text", lambda value: isinstance(value, str))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind(
    "an object of strings", lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
)
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(_is_number(item) for item in value))


def up_to(most: int) -> Kind:
    """Returns a Kind for integers from 1 to `most`."""
    return Kind(f"a positive whole number up to {most}", lambda value: _is_whole(value) and 0 < value <= most)


def or_list(kind: Kind, most: int) -> Kind:
    """Returns a Kind for a single value of `kind`, or a list of 1 to `most` of them."""

    def test(value: Any) -> bool:
        values = value if isinstance(value, (list, tuple)) else [value]
        return 0 < len(values) <= most and all(kind.test(item) for item in values)

    return Kind(f"{kind.name}, or a list of at most {most}", test)


def or_none(kind: Kind) -> Kind:
    """Returns a Kind for values of `kind` or null."""
    return Kind(f"{kind.name}, or null", lambda value: value is None or kind.test(value))


def read(
    path: str | os.PathLike[str], types: Mapping[str, Kind] | None = None, *, largest: int = LARGEST
) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    `types` maps keys to the Kind of their values; absent keys are not checked. `largest` is the size limit in bytes.

    Raises: UserError if the file is missing, unreadable, too large, too deeply nested or not a JSON object, or if a
      value is of another kind.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    return parse(data, str(path), types, largest=largest)


def parse(
    data: str | bytes, where: str, types: Mapping[str, Kind] | None = None, *, largest: int = LARGEST
) -> dict[str, Any]:
    """Parses a JSON object. Raises UserError like `read`; `where` names the source in messages."""
    if len(data) > largest:
        raise UserError(f"{where} can't be read as JSON: it is larger than {largest >> 20} MiB")
    try:
        value = json.loads(data, parse_int=_bounded)
    except RecursionError:
        raise UserError(f"{where} can't be read as JSON: brackets nested deeper than {DEEPEST}") from None
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{where} can't be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} should hold a JSON object, found {type(value).__name__}")
    _check_depth(value, where)
    for key, kind in (types or {}).items():
        if key in value:
            try:
                kind.check(key, value[key])
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return value


def _bounded(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits is too large")
    return int(text)


def _check_depth(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise UserError(f"{where} can't be read as JSON: brackets nested deeper than {DEEPEST}")
