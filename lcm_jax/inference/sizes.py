"""The sizes that a model conditions on, where its family does (SDXL)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lcm_jax.errors import UserError
from lcm_jax.families import Family
from lcm_jax.families.base import default_sizes
from lcm_jax.host import arguments

LARGEST = 2**14  # pixels per side


def checked_sizes(
    family: Family, count: int, height: int, width: int, **given: Any
) -> Int[np.ndarray, "count 6"] | None:
    """Returns the sizes for `count` images of height x width pixels, or None for a family that doesn't use them.

    Args:
      family: of the model.
      count, height, width: the images.
      given: `original_size`, `crop` and `target_size`: each two whole numbers, or None. Original size and target
        size, (height, width), are those of the image by default; `crop`, (top, left), is (0, 0).

    Raises:
      UserError: not two whole numbers in 0 … LARGEST, or the family doesn't use sizes.
    """
    pairs = {name: _pair(name, value) for name, value in given.items() if value is not None}
    if not family.uses_sizes:
        for name in pairs:
            raise UserError(f"{name} has no effect: {family.name} doesn't condition on sizes; leave it out")
        return None
    sizes = default_sizes(count, height, width)
    for i, name in enumerate(("original_size", "crop", "target_size")):
        if name in pairs:
            sizes[:, 2 * i : 2 * i + 2] = pairs[name]
    return sizes


def _pair(name: str, value: Any) -> tuple[int, int]:
    wanted = f"two whole numbers in 0 … {LARGEST}, {'top and left' if name == 'crop' else 'height and width'}"
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)) or len(value) != 2:
        raise UserError(f"{name} is {value!r}; it must be {wanted}")
    first, second = (arguments.whole(name, item) for item in value)
    if not (0 <= first <= LARGEST and 0 <= second <= LARGEST):
        raise UserError(f"{name} is {(first, second)}; it must be {wanted}")
    return first, second
