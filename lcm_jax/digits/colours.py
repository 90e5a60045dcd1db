"""Reading ink and paper from a picture's pixels, with no network."""

import numpy as np
from jaxtyping import Int, UInt8

from lcm_jax.digits.dataset import COLOURS

NAMES = tuple(COLOURS)


def read_colours(images: UInt8[np.ndarray, "n h w 3"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Returns ink and paper of each picture, (n,) numbers in the order of COLOURS.

    Each pixel is counted for the nearest of the eight colours. The paper is the commonest colour of the frame, two
    pixels wide, which a digit hardly touches; the ink is the commonest of the others in the whole picture. A picture
    of one colour has no ink: -1.
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
