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


def checked_negative_sizes(
    family: Family,
    sizes: Int[np.ndarray, "count 6"] | None,
    guided: bool,
    negative_original_size: Any,
    negative_crop: Any,
    negative_target_size: Any,
) -> Int[np.ndarray, "count 6"] | None:
    """Returns the sizes that guidance leads away from: as in diffusers `sizes`, or those given, with a crop at (0, 0).

    Args:
      family: of the model.
      sizes: of the images, from `checked_sizes`.
      guided: whether the model is called without the prompt.
      negative_original_size, negative_crop, negative_target_size: each two whole numbers, or None.

    Raises:
      UserError: as `checked_sizes`; one of the two sizes alone; no guidance.
    """
    given = {"negative_original_size": negative_original_size, "negative_target_size": negative_target_size}
    if all(value is None for value in (*given.values(), negative_crop)):
        return sizes
    if sizes is None:
        raise UserError(f"negative sizes have no effect: {family.name} doesn't condition on sizes; leave them out")
    if not guided:
        raise UserError("negative sizes have no effect without guidance; leave them out")
    for name, value in given.items():
        if value is None:
            raise UserError(f"{name} is missing; give negative_original_size and negative_target_size, or neither")
    original, target = (_pair(name, value) for name, value in given.items())
    crop = (0, 0) if negative_crop is None else _pair("negative_crop", negative_crop)
    return np.tile(np.asarray([*original, *crop, *target], np.int32), (len(sizes), 1))


def _pair(name: str, value: Any) -> tuple[int, int]:
    wanted = f"two whole numbers in 0 … {LARGEST}, {'top and left' if name.endswith('crop') else 'height and width'}"
    if not isinstance(value, (Sequence, np.ndarray)) or isinstance(value, (str, bytes)) or len(value) != 2:
        raise UserError(f"{name} is {value!r}; it must be {wanted}")
    first, second = (arguments.whole(name, item) for item in value)
    if not (0 <= first <= LARGEST and 0 <= second <= LARGEST):
        raise UserError(f"{name} is {(first, second)}; it must be {wanted}")
    return first, second
