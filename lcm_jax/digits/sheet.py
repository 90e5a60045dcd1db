"""Labelled image sheets: one row per model or setting, one column per prompt."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.host.images import GAP, grid

LEFT, HEAD = 165, 18  # pixels: width of the row names, height of the prompts


def sheet(
    rows: dict[str, UInt8[np.ndarray, "n h w 3"]], prompts: Sequence[str], scale: int = 2
) -> UInt8[np.ndarray, "H W 3"]:
    """Arranges images in a grid with row names on the left and prompts above the columns.

    Args:
      rows: row name -> one image per prompt, in the same order.
      prompts: column titles; equal neighbours share one.
      scale: enlargement factor.
    """
    images = np.concatenate(list(rows.values()))
    body = grid(images, columns=len(prompts), scale=scale)
    canvas = Image.new("RGB", (LEFT + body.shape[1], HEAD + body.shape[0]), "white")
    canvas.paste(Image.fromarray(body), (LEFT, HEAD))
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(12), ImageFont.load_default(11)
    height, width = (side * scale + GAP for side in images.shape[1:3])
    for number, name in enumerate(rows):
        pen.text((LEFT - 6, HEAD + number * height + height // 2), name, fill="black", font=font, anchor="rm")
    column = 0
    for prompt, equal in itertools.groupby(prompts):
        count = len(list(equal))
        pen.text((LEFT + (column + count / 2) * width, HEAD // 2), prompt, fill="black", font=small, anchor="mm")
        column += count
    return np.array(canvas)
