"""Damaged images of odd modes and formats, with odd captions: a batch of the right shape, or a UserError."""

import io
import struct
import zlib

import numpy as np
from mutations import TEXTS, damage_bytes, pick
from PIL import Image

from lcm_jax.data.batches import _LoadBatch
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources.tfds import TfdsSource

MODES = {
    "PNG": "1 L LA P RGB RGBA I;16",
    "JPEG": "L RGB CMYK",
    "TIFF": "1 L I;16 I F RGB CMYK",
    "WEBP": "RGB RGBA",
    "GIF": "L P",
    "BMP": "1 L RGB",
    "PPM": "L RGB",
    "JPEG2000": "L RGB RGBA",
}
SIZES = [(1, 1), (32, 32), (17, 40), (1, 300), (300, 2)]


def image(rng) -> tuple[bytes, str]:
    """Returns an image of random format, mode and size, or a small PNG whose header declares a large size."""
    if rng.random() < 0.1:
        width, height = (int(2 ** rng.uniform(10, 31)) for _ in range(2))
        chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, pick(rng, [0, 2, 6]), 0, 0, 0)]
        chunks += [b"IDAT" + zlib.compress(bytes(10**6)), b"IEND"]
        chunks = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunks), f"PNG of {width} x {height}"
    form, size = pick(rng, MODES), pick(rng, SIZES)
    mode = pick(rng, MODES[form].split())
    grey = mode in ("I", "F", "I;16")
    pixels = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    file = io.BytesIO()
    (pixels.convert("L") if grey else pixels).convert(mode).save(file, form)
    return file.getvalue(), f"{form} {mode} {size}"


class Records(list):
    """As TFDS gives them."""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_images(fuzz):
    config = DataConfig(image_size=16)

    def case(rng, place):
        (data, what), damage = image(rng), "whole"
        if rng.random() < 0.8:
            data, damage = damage_bytes(rng, data)
        caption = pick(rng, [*TEXTS, b"caf\xe9", b"\xff\xfe"])
        yield f"{what}: {damage}"
        source = TfdsSource("here", Records([{"image": data, "caption": caption}]), "image", "caption", {})
        load = _LoadBatch(source, config, lambda texts: np.zeros((len(texts), 1)), np.arange(1), sizes=True)
        batch = load.random_map(np.array([0]), rng)
        assert batch["image"].shape == (1, 16, 16, 3)
        assert batch["image"].dtype == np.uint8

    fuzz(case, share=0.15)
