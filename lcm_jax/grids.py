"""Pictures side by side, and PNG files that are whole or not there."""

import os
import pathlib
import tempfile
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from lcm_jax.errors import UserError

GAP = 2  # pixels between pictures
LABEL = 14  # pixels of a label's line


def grid(
    images: UInt8[np.ndarray, "n h w 3"], columns: int = 8, *, scale: int = 1, labels: Sequence[str] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Lays pictures out row by row on white, enlarged `scale` times without smoothing, each above its label."""
    if scale > 1:
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    cell = h + (LABEL if labels else 0)
    sheet = np.full((rows * (cell + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (cell + GAP), i % columns * (w + GAP)
        sheet[top : top + h, left : left + w] = image
    if not labels:
        return sheet
    canvas = Image.fromarray(sheet)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, label in enumerate(labels):
        while label and pen.textlength(label, font=font) > w:
            label = label[:-1]
        pen.text((i % columns * (w + GAP), i // columns * (cell + GAP) + h), label, fill="black", font=font)
    return np.asarray(canvas)


def write_png(path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes a PNG beside `path` and renames it there; makes the folder. Raises UserError where that can't be done."""
    path = pathlib.Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(suffix=".png.tmp", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            Image.fromarray(image).save(file, format="PNG")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise UserError(f"{path} can't be written: {error.strerror or error}") from None
