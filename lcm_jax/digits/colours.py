"""Reads ink and paper colours from the pixels of images, without a network."""

import numpy as np
from jaxtyping import Int, UInt8

from lcm_jax.digits.dataset import COLOURS

NAMES = tuple(COLOURS)


def read_colours(images: UInt8[np.ndarray, "n h w 3"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns ink and paper of each image, (n,) indices into COLOURS.

    Each pixel counts as the nearest of the eight colours. The paper is the most frequent colour in the outer two
    pixels, which a digit hardly touches. The ink is the most frequent other colour in the image, or -1 if there is
    none.
    """
    palette = np.array(list(COLOURS.values()), np.int32)
    nearest = ((images[..., None, :].astype(np.int32) - palette) ** 2).sum(-1).argmin(-1)
    frame = np.ones(images.shape[1:3], bool)
    frame[2:-2, 2:-2] = False
    everywhere = _counts(nearest.reshape(len(images), -1))
    paper = _counts(nearest[:, frame]).argmax(-1)
    everywhere[np.arange(len(images)), paper] = 0
    ink = np.where(everywhere.any(-1), everywhere.argmax(-1), -1)
    return ink, paper


def _counts(colours: np.ndarray) -> np.ndarray:
    return np.stack([(colours == c).sum(-1) for c in range(len(NAMES))], -1)
