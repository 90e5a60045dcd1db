"""A sheet of pictures: a row for each way of drawing, columns of one prompt side by side."""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.host.images import GAP, grid

LEFT, HEAD = 165, 18  # pixels for the rows' names and the columns' prompts


def sheet(
    rows: dict[str, UInt8[np.ndarray, "n h w 3"]], prompts: Sequence[str], scale: int = 2
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays out pictures with the name of their row to the left, and each prompt above its columns.

    Args:
      rows: name -> one picture for each prompt, in their order.
      prompts: the columns' texts; that of equal neighbours is written once.
      scale: enlargement.
    """
    pictures = np.concatenate(list(rows.values()))
    body = grid(pictures, columns=len(prompts), scale=scale)
    canvas = Image.new("RGB", (LEFT + body.shape[1], HEAD + body.shape[0]), "white")
    canvas.paste(Image.fromarray(body), (LEFT, HEAD))
    pen, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(12), ImageFont.load_default(11)
    height, width = (side * scale + GAP for side in pictures.shape[1:3])
    for number, name in enumerate(rows):
        pen.text((LEFT - 6, HEAD + number * height + height // 2), name, fill="black", font=font, anchor="rm")
    column = 0
    for prompt, equal in itertools.groupby(prompts):
        count = len(list(equal))
        pen.text((LEFT + (column + count / 2) * width, HEAD // 2), prompt, fill="black", font=small, anchor="mm")
        column += count
    return np.array(canvas)
