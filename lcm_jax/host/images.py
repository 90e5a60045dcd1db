"""Pixel range conversions, image grids and atomic PNG files."""

import io
import os
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from lcm_jax.host import files

GAP = 2  # pixels between images
LABEL = 14  # height of a label's line in pixels


def to_signed(images: UInt8[Array, "*b 3"] | UInt8[np.ndarray, "*b 3"]) -> Float[Array, "*b 3"]:
    """Converts 0 … 255 to float32 in [-1, 1], the range of the networks."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_unit(images: Float[np.ndarray, "*b 3"]) -> Float[np.ndarray, "*b 3"]:
    """Converts [-1, 1] to [0, 1], clipping values outside."""
    return np.clip(images * 0.5 + 0.5, 0.0, 1.0)


def to_uint8(unit: Float[np.ndarray, "*b 3"]) -> UInt8[np.ndarray, "*b 3"]:
    """Converts [0, 1] to 0 … 255, rounded to the nearest level."""
    return np.round(unit * 255).astype(np.uint8)


def grid(
    images: UInt8[np.ndarray, "n h w 3"],
    columns: int = 8,
    *,
    scale: int = 1,
    labels: Sequence[str] | None = None,
    lines: int = 1,
    title: str = "",
) -> UInt8[np.ndarray, "H W 3"]:
    """Arranges images row by row on a white sheet, each above its label, all below the title if there is one.

    Images are enlarged by the integer `scale` without smoothing. `labels` has one label per image, wrapped at the
    image's width into `lines` lines, of which the last is cut, or is None.
    """
    if scale > 1:
        images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, _ = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    head, cell = LABEL if title else 0, h + (lines * LABEL if labels else 0)
    sheet = np.full((head + rows * (cell + GAP) - GAP, columns * (w + GAP) - GAP, 3), 255, np.uint8)
    corners = [(head + i // columns * (cell + GAP), i % columns * (w + GAP)) for i in range(n)]
    for image, (top, left) in zip(images, corners, strict=True):
        sheet[top : top + h, left : left + w] = image
    if not labels and not title:
        return sheet
    canvas = Image.fromarray(sheet)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)

    def write(text: str, top: int, left: int, width: int, lines: int) -> None:
        for number, line in enumerate(_wrapped(text, lambda part: pen.textlength(part, font=font) <= width, lines)):
            pen.text((left, top + number * LABEL), line, fill="black", font=font)

    write(title, 0, 0, sheet.shape[1], 1)
    for text, (top, left) in zip(labels or [], corners if labels else [], strict=True):
        write(text, top + h, left, w, lines)
    return np.array(canvas)


def _wrapped(text: str, fits: Callable[[str], bool], lines: int) -> list[str]:
    """Breaks a text between words; cuts the last line, and a word that fits in none."""
    found: list[str] = []
    for word in text.split():
        longer = f"{found[-1]} {word}" if found else word
        if found and (fits(longer) or len(found) == lines):
            found[-1] = longer
        else:
            found.append(word)
    return [next(line[:end] for end in range(len(line), -1, -1) if fits(line[:end])) for line in found]


def write_png(
    path: str | os.PathLike[str], image: UInt8[np.ndarray, "h w 3"], texts: Mapping[str, str] | None = None
) -> None:
    """Writes a PNG file atomically and creates its folder. Raises UserError if that fails.

    `texts` are stored in the file: keyword (1 to 79 characters of Latin-1) → text, as a tEXt chunk if the text is
    Latin-1, else as an iTXt chunk in UTF-8 (PNG specification, section 11.3.3). What UTF-8 can't hold is escaped.
    """
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        chunks.add_text(keyword, text.encode("utf-8", "backslashreplace").decode())
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, format="PNG", pnginfo=chunks)
    files.write(path, encoded.getvalue())
