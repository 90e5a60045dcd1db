"""Reading the config.json of a diffusers or transformers model: each value is used, has the one value that this
program implements, or is an error that names it."""

from collections.abc import Mapping, Sequence
from typing import Any

from lcm_jax import json_file
from lcm_jax.errors import UserError


def check(config: Mapping[str, Any], used: Sequence[str], fixed: Mapping[str, Any]) -> None:
    """Raises UserError for a value that would change the model in a way that isn't implemented.

    Args:
      config: the JSON object; keys that start with "_" are notes of the file's writer.
      used: keys that the model reads.
      fixed: keys with the one value, or the tuple of values, that the model implements.
    """
    for key, value in config.items():
        if key.startswith("_") or key in used:
            continue
        if key in fixed:
            allowed = fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],)
            if value not in allowed:
                raise UserError(f"{key} is {value!r}; supported: {', '.join(map(repr, allowed))}")
        elif value not in (None, False):
            raise UserError(f"{key} is {value!r}, an option that is not supported")


def whole_numbers(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises UserError unless each of `names` that `config` has is a positive whole number."""
    _check(config, names, json_file.WHOLE)


def whole_numbers_or_none(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """As `whole_numbers`; None says that the model has no such part."""
    whole_numbers(config, [name for name in names if config.get(name) is not None])


def numbers(config: Mapping[str, Any], names: Sequence[str], *, positive: bool) -> None:
    """Raises UserError unless each of `names` that `config` has is a finite number, above zero where `positive`."""
    _check(config, names, json_file.POSITIVE if positive else json_file.NUMBER)


def booleans(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raises UserError unless each of `names` that `config` has is true or false: "false" would count as true."""
    _check(config, names, json_file.BOOLEAN)


def _check(config: Mapping[str, Any], names: Sequence[str], kind: json_file.Kind) -> None:
    for name in names:
        if name in config:
            kind.check(name, config[name])


def per_level(value: Any, levels: int, key: str) -> tuple[Any, ...]:
    """Returns one value a level, of a list with as many or of a single value; raises UserError for another length."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise UserError(f"{key} has {len(values)} values; block_out_channels has {levels} levels")
    return values


def whole_numbers_per_level(value: Any, levels: int, key: str) -> tuple[int, ...]:
    """As `per_level`; raises UserError for a value that is not a positive whole number too."""
    values = per_level(value, levels, key)
    for number in values:
        whole_numbers({key: number}, [key])
    return values
