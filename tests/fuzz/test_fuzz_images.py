"""Damaged images of odd modes and formats, with odd captions: a batch of the right shape, or a UserError."""

import io

import numpy as np
from mutations import TEXTS, damage_bytes, pick
from PIL import Image

from lcm_jax.data.pipeline import DataConfig, _LoadBatch
from lcm_jax.data.sources import Source

MODES = {
    "PNG": ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"],
    "JPEG": ["L", "RGB", "CMYK"],
    "TIFF": ["1", "L", "I;16", "I", "F", "RGB", "CMYK", "LAB"],
    "WEBP": ["RGB", "RGBA"],
    "GIF": ["L", "P"],
    "BMP": ["1", "L", "RGB"],
    "PPM": ["L", "RGB"],
    "JPEG2000": ["L", "RGB", "RGBA"],
}
SIZES = [(1, 1), (32, 32), (17, 40), (1, 300), (300, 2)]


def encoded(rng) -> tuple[bytes, str]:
    form = pick(rng, MODES)
    mode, size = pick(rng, MODES[form]), pick(rng, SIZES)
    ramp = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
    image = (
        ramp.convert("L").convert(mode)
        if mode in ("I", "F", "I;16")
        else ramp.convert(mode)
        if mode != "LAB"
        else Image.new("LAB", size)
    )
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue(), f"{form} {mode} {size}"


def test_images(fuzz):
    config = DataConfig(image_size=16)

    def case(rng, place):
        data, what = encoded(rng)
        damage = "whole"
        if rng.random() < 0.8:
            data, damage = damage_bytes(rng, data)
        caption = pick(rng, [*TEXTS, b"caf\xe9", b"\xff\xfe"])
        yield f"{what}: {damage}"
        source = Source("here", _Records({"image": data, "caption": caption}), "image", "caption", {})
        batch = _LoadBatch(source, config, lambda texts: np.zeros((len(texts), 1)), np.arange(1)).random_map(
            np.array([0]), rng
        )
        assert batch["image"].shape == (1, 16, 16, 3)
        assert batch["image"].dtype == np.uint8

    fuzz(case, share=0.15)


class _Records(list):
    def __init__(self, record):
        super().__init__([record])

    def __getitems__(self, indices):
        return [self[i] for i in indices]
