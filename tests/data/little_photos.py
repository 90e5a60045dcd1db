"""A realistic data set: images that are not square, several captions nested in features, other images."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


class LittlePhotos(tfds.core.GeneratorBasedBuilder):
    """Twelve of them; in the split "damaged", one has a broken image, and one has no tags."""

    name = "little_photos"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self):
        features = {
            "photo": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "depth": tfds.features.Image(shape=(None, None, 1), dtype=np.uint16, encoding_format="png"),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "tags": tfds.features.Sequence(tfds.features.Text()),
            "title": tfds.features.Text(),
            "size": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "damaged": self._generate_examples(damaged=7)}

    def _generate_examples(self, damaged=None):
        for i in range(12):
            photo = encode(Image.fromarray(photo_pixels(i)), "PNG")
            yield (
                i,
                {
                    "photo": photo if i != damaged else io.BytesIO(photo.getvalue()[:60]),
                    "mask": encode(Image.new("L", (9, 9)), "PNG"),
                    "depth": encode(Image.new("I;16", (2, 2)), "PNG"),
                    "captions": [{"text": f"photo {i} caption {k}", "id": k} for k in range(3)],
                    "tags": [] if i == 3 else [f"tag {i}"],
                    "title": f"photo {i}",
                    "size": i,
                },
            )


def photo_pixels(i):
    """A smooth gradient of 40 x 60 (even i) or 60 x 40 pixels, brighter to the right and below."""
    height, width = (40, 60) if i % 2 == 0 else (60, 40)
    x, y = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 200, height))
    return np.stack([x, y, np.full_like(x, 10 * i)], -1).astype(np.uint8)


def encode(image, form):
    file = io.BytesIO()
    image.save(file, format=form)
    file.seek(0)
    return file
