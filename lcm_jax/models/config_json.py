"""Reading the config.json of a diffusers or transformers model.

Each value is used, has the one value that this program implements, or is an error that names it. Keys of newer versions
are ignored, as diffusers does; `warn_of_unknown` names them.
"""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from lcm_jax.errors import UserError, few, plain
from lcm_jax.host import json_file

LEVELS = 16  # max; published models have up to 4, and each halves the image
MOST_TENSORS = 20_000  # a network of more takes minutes to describe; the UNet of SDXL has 1,680
# Sizes are bounded so that numbers of weights can be computed, before a file's shapes say that the sizes are wrong.
SIZE = json_file.up_to(2**20)
SIZES = json_file.or_list(SIZE, LEVELS)  # one value for all levels, or one per level
BLOCKS = json_file.or_list(json_file.TEXT, LEVELS)


def read_values(config: Mapping[str, Any], kinds: Mapping[str, json_file.Kind]) -> dict[str, Any]:
    """Returns the values of the keys in `kinds`, as far as the JSON object has them.

    Raises:
      UserError: a value is of another kind.
    """
    values = {key: config[key] for key in kinds if key in config}
    for key, value in values.items():
        kinds[key].check(key, value)
    return values


def check_fixed(config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raises UserError for a value that would change the model in a way that isn't implemented.

    Args: the JSON object; keys with the one value, or the tuple of values, that the model implements.
    """
    for key in [key for key in config if key in fixed]:
        allowed = fixed[key] if isinstance(fixed[key], tuple) else (fixed[key],)
        if config[key] not in allowed:
            value = plain(repr(config[key]), 100)
            raise UserError(f"{key} is {value}; supported: {', '.join(map(repr, allowed))}")


def warn_of_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Warns once of the keys that neither this program nor the diffusers that it was written for knows.

    Keys that start with "_" are notes of the file's writer, and an option that is null or false is off.
    """
    unknown = [
        key for key, value in config.items() if key not in known and key[:1] != "_" and value not in (None, False)
    ]
    if unknown:
        warnings.warn(
            f"{where} has keys that are not known here, perhaps of a newer diffusers, and that are ignored: "
            f"{few(unknown)}",
            UserWarning,
            stacklevel=2,
        )


def check_size(tensors: int) -> None:
    """Raises UserError for a network of too many tensors. Args: the least number that the config describes."""
    if tensors > MOST_TENSORS:
        raise UserError(f"it describes a network of more than {MOST_TENSORS} tensors")


def per_level(value: Any, levels: int, key: str) -> tuple[Any, ...]:
    """Returns one value per level, from a list or a single value; raises UserError for a list of another length."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels
    if len(values) != levels:
        raise UserError(f"{key} has {len(values)} values; block_out_channels has {levels} levels")
    return values
