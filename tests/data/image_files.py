"""Image files of kinds that Pillow itself doesn't write."""

import io
import struct
import zlib

import numpy as np


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
