"""Turns an encoded image into RGB: which files are read, how large they may be, and which sample is black or white.

Samples are converted by the range that the file defines, never by the values found in one image:

* 8 bits and fewer, palettes, CMYK, YCbCr, LAB: as Pillow converts them. Transparency is laid on white. 16 bits per
  channel of a color image: Pillow reads the upper 8.
* 16-bit gray: 0 is black, 65535 white; in a TIFF of 12 bits, 4095 is white.
* 32-bit or signed integers (TIFF): 0 is black, the type's largest value white. Negative samples have no brightness, and
  an image that is black all over under this range was stored in another one: both are bad images.
* Floating point (TIFF, PFM): 0 is black, 1 white, as image editors and cameras' DNG files have it. The formats
  themselves name no range, so an image with any sample outside is a bad one.
* TIFF's WhiteIsZero is obeyed. Its MinSampleValue and MaxSampleValue are statistics, not the range of the image.

An ICC profile is not applied. Of several frames or pages the first is read, and no other is decoded.
"""

import io
import itertools
import threading
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps

from lcm_jax.errors import UserError, plain

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

# Known by their first bytes and decoded in this process: EPS, for instance, would run Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI")
MAX_ASPECT = 16  # of a longer strip, only the part around the square is resized
_LARGE_JPEG = 2**24  # pixels; larger JPEG files are decoded at a reduced scale where that is enough
_BAND = 2**20  # pixels that are converted at a time
_WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's gray modes of more than 8 bits
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # values of SampleFormat

_opening = threading.Lock()  # held while Pillow's own limit is off


class BadImage(UserError):
    """A file that can't be used as an image of a data set: why, and what would be right."""


def decode(encoded: bytes, size: int, max_pixels: int) -> Image.Image:
    """Decodes the first frame of an image file to RGB, turned upright.

    Args: the file (PNG, JPEG, …); the pixels to which its shorter side will be resized; the limit of width · height,
    which is checked before anything is decoded.
    Returns an image of the file's size. A JPEG of more than 2^24 pixels may be smaller, by a factor of 2, 4 or 8: its
    shorter side keeps at least 2 · size. Raises BadImage.
    """
    try:
        with _open(encoded) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise BadImage(
                    f"it has {width} x {height} pixels, more than config.data.max_pixels={max_pixels};"
                    " reduce the image, or allow more"
                )
            if file.format in ("JPEG", "MPO") and width * height > _LARGE_JPEG:
                file.draft(None, (2 * size, 2 * size))  # never below
            white = _white(file)
            ImageOps.exif_transpose(file, in_place=True)
            return _rgb(file, *white)
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = plain(error, 200) or type(error).__name__
        raise BadImage(f"Pillow reads no image from it: {reason}; the file may be damaged or cut short") from None


def square(
    image: Image.Image, size: int, resize: str, place: float = 0.5, mirror: bool = False
) -> UInt8[np.ndarray, "size size 3"]:
    """Resizes the shorter side of an RGB image to `size` and crops a square.

    Args: a key of RESAMPLING; where along the longer side the square lies, 0 <= place < 1 (0.5 = centre); whether to
    mirror. Returns uint8 RGB.
    """
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) > longest:  # 2000 x 1 pixels would be resized to 1,024,000 x 512
        kept = [min(side, longest) for side in image.size]
        left, top = (int(place * (side - keep + 1)) for side, keep in zip(image.size, kept, strict=True))
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), RESAMPLING[resize])
    left, top = int(place * (width - size + 1)), int(place * (height - size + 1))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return np.ascontiguousarray(pixels[:, ::-1] if mirror else pixels)


def _open(encoded: bytes) -> ImageFile.ImageFile:
    """Reads the header. Pillow's own limit would warn on stderr, or refuse what max_pixels allows."""
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow has no AVIF
    try:
        with _opening:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                file: Any = Image.open(io.BytesIO(encoded), formats=known)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    except Image.UnidentifiedImageError:
        raise BadImage(
            f"Pillow finds no header of {', '.join(known)} in it; the file may be damaged, or of a kind that"
            " must be converted first"
        ) from None
    if file.format == "PNG" and file.mode == "RGB" and encoded[24] == 16 and "transparency" in file.info:
        file.info["transparency"] = tuple(value >> 8 for value in file.info["transparency"])  # as the pixels are read
    return file


def _white(file: ImageFile.ImageFile) -> tuple[float, bool, bool]:
    """Returns the sample that is white, whether the scale is inverted, and whether the range is to be doubted.

    It counts for the modes in _WIDE only. Raises BadImage for 8-bit samples that Pillow reads wrongly.
    """
    if file.format != "TIFF":
        return (1.0 if file.mode == "F" else 65535.0), False, False
    tags: Any = file.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    bits, kind = tags.get(_BITS, (1,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    if kind == _SIGNED and file.mode not in _WIDE:
        raise BadImage("its samples are signed 8-bit numbers, not brightness; store it as unsigned ones")
    white = {_SIGNED: 2.0 ** (bits - 1) - 1, _FLOAT: 1.0}.get(kind, 2.0**bits - 1)
    return white, tags.get(_PHOTOMETRIC) == 0, kind == _SIGNED or (kind == _UNSIGNED and bits > 16)


def _rgb(image: Image.Image, white: float, inverted: bool, doubted: bool) -> Image.Image:
    """Converts in bands, so that never more than the image and its RGB copy are held."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    converted = Image.new("RGB", image.size)
    columns, rows = _BAND, max(1, _BAND // image.width)
    largest = 0.0
    for left, top in itertools.product(range(0, image.width, columns), range(0, image.height, rows)):
        band = image.crop((left, top, min(left + columns, image.width), min(top + rows, image.height)))
        if image.mode in _WIDE:
            samples = _samples(band, white)
            largest = max(largest, float(samples.max()))
            band = _gray(samples, white, inverted, image.info.get("transparency"))
        elif band.has_transparency_data:
            band = band.convert("LA") if band.mode == "La" else band
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band.convert("RGBA"))
        converted.paste(band.convert("RGB"), (left, top))
    if doubted and largest < white / 255:
        raise BadImage(
            f"its largest sample is {largest:g}, and white is {white:g} by the file: it would be black all over;"
            " store it with 8 or 16 bits"
        )
    return converted


def _samples(band: Image.Image, white: float) -> np.ndarray:
    """Returns the numbers that a gray image of more than 8 bits holds; raises BadImage for those without brightness."""
    samples = np.asarray(band)
    if white == 2.0**32 - 1:
        samples = samples.view(np.uint32)  # Pillow has no mode for them
    if not (samples.min() >= 0 and samples.max() <= white):  # so that NaN is outside as well
        raise BadImage(
            f"it has samples from {samples.min():g} to {samples.max():g}, and black is 0 and white {white:g} by the"
            " file; scale it, and store it with 8 or 16 bits"
        )
    return samples


def _gray(samples: np.ndarray, white: float, inverted: bool, transparent: int | None) -> Image.Image:
    levels = np.rint(samples * (255 / white)).astype(np.uint8)
    if inverted:
        levels = 255 - levels
    if transparent is not None:
        levels[samples == transparent] = 255
    return Image.fromarray(levels)
