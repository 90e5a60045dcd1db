"""Decodes image files to RGB: supported formats, size limits and sample ranges.

Samples are scaled by the range that the file defines, never by the values found in one image:

* 8 bits and fewer, palettes, CMYK, YCbCr, LAB: converted by Pillow. Transparent pixels are composited on white. For
  color images with 16 bits per channel, Pillow reads the upper 8.
* 16-bit gray: 0 is black, 65535 white; in a 12-bit TIFF, 4095 is white.
* 32-bit or signed integers (TIFF): 0 is black, the type's largest value white. Images with negative samples raise
  BadImage; so do images that would be black everywhere, since they were stored in another range.
* Floating point (TIFF, PFM): 0 is black, 1 white, as in image editors and DNG files. The formats themselves define no
  range, so an image with any sample outside [0, 1] raises BadImage.
* TIFF's WhiteIsZero is applied. Its MinSampleValue and MaxSampleValue are statistics, not a range, and are ignored.

ICC profiles are not applied. Only the first frame or page is decoded.
"""

import io
import itertools
import threading
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFile, ImageOps

from lcm_jax.errors import UserError, plain

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}

# Formats identified by their first bytes and decoded in-process; EPS, for example, would run Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI")
MAX_ASPECT = 16  # longer strips are cropped around the square before they are resized
_LARGE_JPEG = 2**24  # pixels; larger JPEG files are decoded at a reduced scale if that is enough
_BAND = 2**20  # pixels converted at a time
_WIDE = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # Pillow's gray modes of more than 8 bits
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
_ORIENTATION, _TURNED = 274, (5, 6, 7, 8)  # EXIF tag, and its values that exchange width and height
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # values of SampleFormat

_opening = threading.Lock()  # held while Pillow's global pixel limit is disabled


class BadImage(UserError):
    """A file that can't be used as an image. The message gives the reason and a remedy."""


class Decoded(NamedTuple):
    """An RGB image, and width and height of the upright image in the file, which may be larger."""

    image: Image.Image
    original: tuple[int, int]


class Square(NamedTuple):
    """A square of an image, uint8 (S, S, 3), and where it lies: top and left in the resized image, upright."""

    pixels: UInt8[np.ndarray, "size size 3"]
    corner: tuple[int, int]


def decode(encoded: bytes, size: int, max_pixels: int) -> Decoded:
    """Decodes the first frame of an image file (PNG, JPEG, …) to RGB and applies its EXIF orientation.

    `size` is the length in pixels to which the shorter side will be resized later. A JPEG of more than 2^24 pixels may
    be returned smaller by a factor of 2, 4 or 8, with a shorter side of at least 2 · size.

    Raises: BadImage, also for width · height > max_pixels, which is checked before decoding.
    """
    try:
        with _open(encoded) as file:
            width, height = file.size
            if width * height > max_pixels:
                raise BadImage(
                    f"it has {width} x {height} pixels, more than config.data.max_pixels={max_pixels};"
                    " reduce the image, or raise the limit"
                )
            if file.format in ("JPEG", "MPO") and width * height > _LARGE_JPEG:
                file.draft(None, (2 * size, 2 * size))  # never smaller than this
            white = _white(file)
            turned = file.getexif().get(_ORIENTATION) in _TURNED
            ImageOps.exif_transpose(file, in_place=True)
            return Decoded(_rgb(file, *white), (height, width) if turned else (width, height))
    except BadImage:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        reason = plain(error, 200) or type(error).__name__
        raise BadImage(f"Pillow can't decode it: {reason}; the file may be damaged or truncated") from None


def square(image: Image.Image, size: int, resize: str, place: float = 0.5, mirror: bool = False) -> Square:
    """Resizes the shorter side of an RGB image to `size` and crops a square.

    `resize` is a key of RESAMPLING, `place` the position of the square along the longer side, 0 <= place < 1
    (0.5 = center). `mirror` flips the result horizontally; its corner is then that in the mirrored image.
    """
    whole, cut = image.width, (0, 0)  # before the cut, whose left and top are needed below
    longest = MAX_ASPECT * min(image.size)
    if max(image.size) > longest:  # 2000 x 1 pixels would be resized to 1,024,000 x 512
        kept = [min(side, longest) for side in image.size]
        left, top = (int(place * (side - keep + 1)) for side, keep in zip(image.size, kept, strict=True))
        cut = left, top
        image = image.crop((left, top, left + kept[0], top + kept[1]))
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), RESAMPLING[resize])
    left, top = int(place * (width - size + 1)), int(place * (height - size + 1))
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    top, left = (round(offset * scale) + part for offset, part in ((cut[1], top), (cut[0], left)))
    if mirror:
        return Square(np.ascontiguousarray(pixels[:, ::-1]), (top, round(whole * scale) - size - left))
    return Square(np.ascontiguousarray(pixels), (top, left))


def fitted(encoded: bytes, height: int, width: int, max_pixels: int = 64_000_000) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image file, scales it to cover height x width pixels and crops its middle.

    Raises: BadImage, as `decode`.
    """
    image, _ = decode(encoded, max(height, width), max_pixels)
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _open(encoded: bytes) -> ImageFile.ImageFile:
    """Reads the header, without Pillow's pixel limit, which would warn or reject images that max_pixels allows."""
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
            f"Pillow finds no header of {', '.join(known)} in it; the file may be damaged, or in a format that must "
            "be converted first"
        ) from None
    if file.format == "PNG" and file.mode == "RGB" and encoded[24] == 16 and "transparency" in file.info:
        file.info["transparency"] = tuple(value >> 8 for value in file.info["transparency"])  # 8 bits, like the pixels
    return file


def _white(file: ImageFile.ImageFile) -> tuple[float, bool, bool]:
    """Returns the sample value of white, whether the scale is inverted, and whether the range is uncertain.

    Used for the modes in _WIDE only. Raises BadImage for signed 8-bit samples, which Pillow misreads.
    """
    if file.format != "TIFF":
        return (1.0 if file.mode == "F" else 65535.0), False, False
    tags: Any = file.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    bits, kind = tags.get(_BITS, (1,))[0], tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    if kind == _SIGNED and file.mode not in _WIDE:
        raise BadImage("its samples are signed 8-bit integers, not brightness; store them unsigned")
    white = {_SIGNED: 2.0 ** (bits - 1) - 1, _FLOAT: 1.0}.get(kind, 2.0**bits - 1)
    return white, tags.get(_PHOTOMETRIC) == 0, kind == _SIGNED or (kind == _UNSIGNED and bits > 16)


def _rgb(image: Image.Image, white: float, inverted: bool, doubted: bool) -> Image.Image:
    """Converts an image to RGB in bands, so that memory holds only the image and its RGB copy."""
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
            f"its largest sample is {largest:g}, but the file's white is {white:g}: it would be all black; store it "
            "with 8 or 16 bits"
        )
    return converted


def _samples(band: Image.Image, white: float) -> np.ndarray:
    """Returns the samples of a gray image of more than 8 bits; raises BadImage if any is outside [0, white]."""
    samples = np.asarray(band)
    if white == 2.0**32 - 1:
        samples = samples.view(np.uint32)  # Pillow has no unsigned 32-bit mode
    if not (samples.min() >= 0 and samples.max() <= white):  # also true for NaN
        raise BadImage(
            f"its samples are in {samples.min():g} … {samples.max():g}, but the file's black is 0 and its white "
            f"{white:g}; rescale it, and store it with 8 or 16 bits"
        )
    return samples


def _gray(samples: np.ndarray, white: float, inverted: bool, transparent: int | None) -> Image.Image:
    levels = np.rint(samples * (255 / white)).astype(np.uint8)
    if inverted:
        levels = 255 - levels
    if transparent is not None:
        levels[samples == transparent] = 255
    return Image.fromarray(levels)
