"""JSON from outside, read in one way: bounded in size and depth, an object, each value that is used of its type.

A reader says which types its keys have, and gets a plain dict or a UserError that names the file, the key and the
value that was found:

    read(path, {"beta_start": NUMBER, "trained_betas": or_none(LIST)})
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from lcm_jax.errors import UserError, plain

LARGEST = 64 * 2**20  # bytes: twice the largest file of a published model, an index of weights or a vocabulary
DEEPEST = 64  # brackets inside each other
CONFIG = 2**20  # bytes: the limit for a configuration, of which published ones have some thousand
MOST_DIGITS = 100  # of one number


@dataclasses.dataclass(frozen=True)
class Kind:
    """A type of a value: its name in messages, and the test for it."""

    name: str
    test: Callable[[Any], bool]

    def check(self, key: str, value: Any) -> None:
        """Raises UserError that names the key, unless the value is of this kind."""
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
    "an object of texts", lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
)
NUMBERS = Kind("a list of numbers", lambda value: isinstance(value, list) and all(_is_number(item) for item in value))


def up_to(most: int) -> Kind:
    """Returns the kind of whole numbers from 1 to `most`."""
    return Kind(f"a positive whole number up to {most}", lambda value: _is_whole(value) and 0 < value <= most)


def or_list(kind: Kind, most: int) -> Kind:
    """Returns the kind of single values, and of lists of 1 to `most` of them."""

    def test(value: Any) -> bool:
        values = value if isinstance(value, (list, tuple)) else [value]
        return 0 < len(values) <= most and all(kind.test(item) for item in values)

    return Kind(f"{kind.name}, or a list of at most {most}", test)


def or_none(kind: Kind) -> Kind:
    """Returns the kind of values that may be null too."""
    return Kind(f"{kind.name}, or null", lambda value: value is None or kind.test(value))


def read(
    path: str | os.PathLike[str], types: Mapping[str, Kind] | None = None, *, largest: int = LARGEST
) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Args: the file; the kind of each value that the caller uses, by key (a key that is absent is not checked); the
      largest size of the file in bytes.
    Raises: UserError if the file is missing, too large, too deep, no JSON object, or a value is of another kind.
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
    """Returns the object that a JSON text holds; raises UserError as `read` does, `where` for the file."""
    if len(data) > largest:
        raise UserError(f"{where} can't be read as JSON: it is larger than {largest >> 20} MiB")
    try:
        value = json.loads(data, parse_int=_bounded)
    except RecursionError:
        raise UserError(f"{where} can't be read as JSON: brackets in brackets, deeper than {DEEPEST}") from None
    except ValueError as error:  # UnicodeDecodeError too
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
    raise UserError(f"{where} can't be read as JSON: brackets in brackets, deeper than {DEEPEST}")
