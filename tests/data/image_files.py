"""Image files of many kinds, those that Pillow itself doesn't write among them."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def encode(image, form, **options):
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def tiff(samples, *, bits=None, white_is_zero=False):
    """A gray TIFF of any number type and byte order; `bits`, where the samples are packed: bytes (height, n)."""
    order = ">" if samples.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    (height, width), data = samples.shape, samples.tobytes()
    values = {256: width * samples.itemsize * 8 // bits if bits else width, 257: height}
    values |= {258: bits or samples.itemsize * 8, 259: 1, 262: 0 if white_is_zero else 1}
    values |= {273: 8, 277: 1, 278: height, 279: len(data), 339: kind}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + struct.pack(f"{order}H", len(values)) + entries + bytes(4)


def png(width, height, *chunks, bits=8, color=2):
    """A PNG of these chunks (name, data) between its header and its end."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in (header, *chunks, (b"IEND", b"")))


def rows(samples):
    """The chunk of a PNG's pixels, given as big-endian samples or bytes (height, …)."""
    return b"IDAT", zlib.compress(b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in samples))


# ---- a ramp from black to white, in every kind of samples

SIZE = 32
RAMP = np.tile(np.linspace(0, 1, SIZE), (SIZE, 1))  # black to white
GRAY = Image.fromarray(np.rint(RAMP * 255).astype(np.uint8))
RGB, OPAQUE = GRAY.convert("RGB"), Image.new("L", GRAY.size, 255)


def samples(dtype, white):
    return np.rint(RAMP * white).astype(dtype)


def packed_12_bits():
    values = samples(np.uint16, 4095).reshape(SIZE, -1, 2)
    first, second = values[..., 0], values[..., 1]
    parts = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    return parts.reshape(SIZE, -1).astype(np.uint8)


def premultiplied():
    """A TIFF whose ExtraSamples says that the gray is multiplied by alpha, which is 255."""
    plain, tag = encode(Image.merge("LA", (GRAY, OPAQUE)), "TIFF"), b"\x52\x01\x03\x00\x01\x00\x00\x00"
    assert plain.count(tag + b"\x02") == 1
    return plain.replace(tag + b"\x02", tag + b"\x01")


RAMP16_ALPHA = np.concatenate([np.repeat(RAMP[..., None] * 65535, 3, -1), np.full((SIZE, SIZE, 1), 65535)], -1)
RAMP16_ALPHA = RAMP16_ALPHA.astype(">u2")
SIXTEEN = Image.fromarray(samples(np.uint16, 65535))
KINDS = {
    "gray": lambda: encode(GRAY, "PNG"),
    "gray, alpha": lambda: encode(Image.merge("LA", (GRAY, OPAQUE)), "PNG"),
    "gray, alpha, TIFF": lambda: encode(Image.merge("LA", (GRAY, OPAQUE)), "TIFF"),
    "gray, premultiplied alpha": premultiplied,
    "gray, 16 bits": lambda: encode(SIXTEEN, "PNG"),
    "gray, 16 bits, TIFF": lambda: encode(SIXTEEN, "TIFF"),
    "gray, 16 bits, TIFF with LZW": lambda: encode(SIXTEEN, "TIFF", compression="tiff_lzw"),
    "gray, 16 bits, big-endian": lambda: tiff(samples(">u2", 65535)),
    "gray, 16 bits, white is zero": lambda: tiff(samples("<u2", 65535)[:, ::-1], white_is_zero=True),
    "gray, 16 bits, signed": lambda: tiff(samples("<i2", 2**15 - 1)),
    "gray, 16 bits, PGM": lambda: encode(SIXTEEN, "PPM"),
    "gray, 10 bits, PGM": lambda: b"P5 32 32 1023\n" + samples(">u2", 1023).tobytes(),
    "gray, 16 bits, JPEG 2000": lambda: encode(SIXTEEN, "JPEG2000"),
    "gray, 12 bits": lambda: tiff(packed_12_bits(), bits=12),
    "gray, 32 bits": lambda: tiff(samples("<u4", 2**32 - 1)),
    "gray, 32 bits, signed": lambda: tiff(samples(">i4", 2**31 - 1)),
    "floating point": lambda: encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "floating point, big-endian": lambda: tiff(RAMP.astype(">f4")),
    "floating point, white is zero": lambda: tiff(RAMP[:, ::-1].astype("<f4"), white_is_zero=True),
    "floating point, PFM": lambda: encode(Image.fromarray(RAMP.astype(np.float32)), "PPM"),
    "color, 16 bits": lambda: png(SIZE, SIZE, rows(np.repeat(samples(">u2", 65535), 3, 1)), bits=16),
    "color, alpha, 16 bits": lambda: png(SIZE, SIZE, rows(RAMP16_ALPHA), bits=16, color=6),
    "palette": lambda: encode(GRAY.convert("P"), "PNG"),
    "palette, alpha": lambda: encode(GRAY.convert("PA"), "TIFF"),
    "palette, one color transparent": lambda: encode(GRAY.convert("P"), "PNG", transparency=255),
    "palette, an alpha per color": lambda: encode(GRAY.convert("P"), "PNG", transparency=bytes([255] * 256)),
    "CMYK": lambda: encode(RGB.convert("CMYK"), "TIFF"),
    "CMYK, JPEG": lambda: encode(RGB.convert("CMYK"), "JPEG", quality=95),
    "YCbCr": lambda: encode(RGB.convert("YCbCr"), "TIFF"),
    "LAB": lambda: encode(RGB.convert("LAB"), "TIFF"),
    "QOI": lambda: (
        b"qoif\0\0\0\x20\0\0\0\x20\3\0" + b"".join(b"\xfe" + bytes(p) for p in np.asarray(RGB).reshape(-1, 3))
    ),
}
