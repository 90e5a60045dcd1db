"""Validates the config.json of a diffusers or transformers model.

A value is used, or must equal the one that this package implements; otherwise an error names it. Unknown keys (of newer
versions) are ignored, as in diffusers; `warn_of_unknown` lists them.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from lcm_jax.errors import UserError, few, plain
from lcm_jax.host import json_file

LEVELS = 16  # max; published models have up to 4, and each halves the image
MOST_TENSORS = 20_000  # max; larger networks take minutes to trace; SDXL's UNet has 1,680
# Sizes are bounded so that weight counts can be computed before the shapes are compared with the file.
SIZE = json_file.up_to(2**20)
SIZES = json_file.or_list(SIZE, LEVELS)  # one value for all levels, or one per level
BLOCKS = json_file.or_list(json_file.TEXT, LEVELS)


def read_values(config: Mapping[str, Any], kinds: Mapping[str, json_file.Kind]) -> dict[str, Any]:
    """Returns the values of the keys in `kinds` that the JSON object has.

    Raises:
      UserError: a value isn't of its key's kind.
    """
    values = {key: config[key] for key in kinds if key in config}
    for key, value in values.items():
        kinds[key].check(key, value)
    return values


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises UserError for a value that isn't implemented.

    Args:
      config: the JSON object.
      fixed: key → the supported value, or a tuple of supported values.
    """
    for key in [key for key in config if key in fixed]:
        allowed = fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],)
        if config[key] not in allowed:
            value = plain(repr(config[key]), 100)
            raise UserError(f"{key} is {value}; supported: {', '.join(map(repr, allowed))}")


def warn_of_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Warns, in one warning, about the keys that are not in `known`.

    Keys that start with "_" (metadata) and values that are null or false (options that are off) are skipped.
    """
    unknown = [
        key for key, value in config.items() if key not in known and key[:1] != "_" and value not in (None, False)
    ]
    if unknown:
        warnings.warn(
            f"{where} has unknown keys, perhaps from a newer diffusers, which are ignored: {few(unknown)}",
            UserWarning,
            stacklevel=2,
        )


def check_size(tensors: int) -> None:
    """Raises UserError if `tensors`, the least number of tensors that the config implies, is too large."""
    if tensors > MOST_TENSORS:
        raise UserError(f"it describes a network of more than {MOST_TENSORS} tensors")


def per_level(value: Any, levels: int, key: str) -> tuple[Any, ...]:
    """Returns one value per level from a list or a single value; raises UserError if the list's length differs."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise UserError(f"{key} has {len(values)} values; block_out_channels has {levels} levels")
    return values
