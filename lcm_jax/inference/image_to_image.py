"""Image to image: latents of the images that sampling starts from."""

import os
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lcm_jax.errors import UserError
from lcm_jax.host.images import to_signed

Bound = Any  # `bound.Bound` of an autoencoder


def image_array(image: Any, channels: int) -> np.ndarray:
    """Returns images as uint8 or float32 (n, H, W, 3), or latents as float32 (n, h, w, C), C = `channels`.

    Raises:
      UserError: neither of them, or values out of range.
    """
    if isinstance(image, str | os.PathLike):
        raise UserError('image is a path; open it: np.asarray(PIL.Image.open(path).convert("RGB"))')
    try:
        array = np.asarray(image)
    except (TypeError, ValueError):
        array = np.asarray(None)
    array = array[None] if array.ndim == 3 else array
    wanted = f"uint8 or float in [0, 1] (H, W, 3), one or several, or scaled latents (h, w, {channels})"
    if array.ndim != 4 or array.shape[-1] not in (3, channels) or not array.size:
        raise UserError(f"image has the shape {array.shape}; it must be {wanted}")
    if array.dtype == np.uint8 and array.shape[-1] == 3:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"image has the dtype {array.dtype}; it must be {wanted}")
    if not np.isfinite(array).all():
        raise UserError(f"image has values that are not finite; it must be {wanted}")
    if array.shape[-1] == 3 and not (array.min() >= 0 and array.max() <= 1):
        raise UserError(f"image has values outside [0, 1]; it must be {wanted}")
    return array.astype(np.float32)


def image_size(array: np.ndarray, factor: int) -> tuple[int, int]:
    """Returns height and width in pixels; raises UserError unless `factor` divides those of the images."""
    height, width = array.shape[1:3] if array.shape[-1] == 3 else (side * factor for side in array.shape[1:3])
    if height % factor or width % factor:
        raise UserError(f"image is {height} x {width} pixels; both must be multiples of {factor}: crop or resize it")
    return height, width


def initial_latents(
    vae: Bound, array: np.ndarray, count: int, each: int, batch_size: int
) -> Float[np.ndarray, "b h w c"]:
    """Returns scaled latents (count, h, w, C): the means of the images' posteriors, or the latents themselves.

    Args:
      vae: the autoencoder.
      array: from `image_array`: one for all, one per prompt, or one per result.
      count: number of results.
      each: results per prompt, which follow each other.
      batch_size: images that are encoded at once.

    Raises:
      UserError: another number of images.
    """
    if len(array) not in (1, count // each, count):
        raise UserError(f"image holds {len(array)} images for {count // each} prompts; give one, or one per prompt")
    if array.shape[-1] == 3:
        levels = array if array.dtype == np.uint8 else 255 * array
        encoded = []
        for start in range(0, len(levels), batch_size):
            part = levels[start : start + batch_size]
            padded = np.concatenate([part, np.repeat(part[-1:], min(batch_size, len(levels)) - len(part), 0)])
            of_part = vae(to_signed(jax.numpy.asarray(padded)), None, method="to_latents")
            encoded.append(np.asarray(of_part)[: len(part)])
        array = np.concatenate(encoded)
    if len(array) == 1:
        return np.repeat(array, count, 0)
    return array if len(array) == count else np.repeat(array, each, 0)
