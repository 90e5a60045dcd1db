"""Tests of the table that finds the source of a directory, with a source that has nothing to do with TFDS."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from little_photos import encode as encoded
from PIL import Image

from lcm_jax import encode
from lcm_jax.data import sources
from lcm_jax.data.batches import batches
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import Kind, open_data
from lcm_jax.data.sources.base import caption_text
from lcm_jax.data.sources.tfds import TfdsSource, open_tfds
from lcm_jax.errors import UserError
from lcm_jax.training.identity import of_data


class Shades:
    """Source of one gray image per line of shades.txt; the line is its caption. It inherits nothing."""

    metadata = {}  # noqa: RUF012

    def __init__(self, config):
        self.where = config.directory
        with open(f"{config.directory}/shades.txt", "rb") as file:
            self.lines = file.read().splitlines()

    def __len__(self):
        return len(self.lines)

    def read(self, indices):
        return [(self._file(i), [caption_text(self.lines[i])]) for i in indices]

    def stored(self, indices):
        return [self.lines[i] for i in indices]

    def bad_image(self, index, error):
        return UserError(f"line {index + 1} of {self.where}: {error}")

    def _file(self, index):
        shade = self.lines[index].split()[-1]
        return encoded(Image.new("RGB", (9, 9), (int(shade),) * 3), "PNG").read() if shade.isdigit() else b"no image"


(TFDS,) = (kind for kind in sources.KINDS if kind.open is open_tfds)
SHADES = Kind(lambda path: (path / "shades.txt").exists(), lambda path: "it has no shades.txt", Shades)


@pytest.fixture
def shades(tmp_path, monkeypatch):
    """A directory that `Shades` recognises; the table has TFDS and this source."""
    monkeypatch.setattr(sources, "KINDS", (TFDS, SHADES))
    (tmp_path / "shades.txt").write_bytes(b"dark \xff 10\nlight 200\n")
    return DataConfig(directory=str(tmp_path), image_size=8, shuffle=False, threads=1)


def test_a_directory_is_opened_by_the_source_that_recognises_it(shades, photos):
    assert isinstance(open_data(shades), Shades)
    other = DataConfig(directory=photos, image_key="photo", caption_key="title")
    assert isinstance(open_data(other), TfdsSource)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "KINDS", (Kind(lambda path: True, str, lambda config: "first"), *sources.KINDS))
        assert open_data(shades) == open_data(other) == "first"


def test_training_reads_it(shades):
    texts = []
    read = batches(shades, tokenize=lambda t: texts.append(t) or np.zeros((2, 1)), batch_size=2, seed=0)
    assert next(read)["image"][:, 0, 0, 0].tolist() == [10, 200]
    read.close()
    assert texts[0] == ["dark \ufffd 10", "light 200"]


def test_encode_reads_it(shades):
    config = SimpleNamespace(seed=0, data=shades)
    ((images, captions),) = encode.prepared_images(open_data(shades), config, batch_size=5)
    assert [image.pixels[0, 0, 0] for image in images] == [10, 200]
    assert captions == [["dark \ufffd 10"], ["light 200"]]


def test_its_identity_is_its_content(shades, tmp_path):
    before = of_data(open_data(shades)).facts
    assert of_data(open_data(shades)).facts == before
    (tmp_path / "shades.txt").write_text("dark 10\nlight 201\n")
    assert of_data(open_data(shades)).facts != before


def test_a_bad_image_is_named_by_its_source(shades, tmp_path):
    (tmp_path / "shades.txt").write_text("dark 10\nnone\n")
    read = batches(shades, tokenize=lambda texts: np.zeros((2, 1)), batch_size=2, seed=0)
    with pytest.raises(UserError, match=f"^line 2 of {tmp_path}: "):
        next(read)
    read.close()
    with pytest.raises(UserError, match=f"^line 2 of {tmp_path}: "):
        list(encode.prepared_images(open_data(shades), SimpleNamespace(seed=0, data=shades), batch_size=2))


def message(directory):
    with pytest.raises(UserError) as caught:
        open_data(DataConfig(directory=str(directory)))
    return str(caught.value)


NO_TFDS = "it is not a prepared TFDS data set: it has no dataset_info.json"


@pytest.mark.usefixtures("shades")
def test_a_directory_that_no_source_recognises(tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    reasons = f"{NO_TFDS}; docs/own_data.md says how to prepare one; it has no shades.txt"
    assert message(other) == f"{other} is empty; {reasons}"
    for name in "edcba":
        (other / f"{name}.png").write_bytes(b"")
    assert message(other) == f"{other} holds a.png, b.png, c.png and 2 more; {reasons}"
    assert message(other / "a.png") == f"{other}/a.png is a file; {reasons}"
    missing = f"data directory {other}/z does not exist; give your own with --config.data.directory=DIR"
    assert message(other / "z").startswith(missing)


def test_the_right_directory_below_is_named(photos):
    name, version = photos.rsplit("/", 1)
    assert message(name).startswith(f"{name} holds {version}; {NO_TFDS}; did you mean {photos}?")


def test_a_directory_that_cannot_be_read(shades, monkeypatch):
    def broken(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "KINDS", (dataclasses.replace(SHADES, recognises=broken),))
    assert message(shades.directory) == f"{shades.directory} can't be read: Permission denied"
