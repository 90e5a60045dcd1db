"""Data sets that are prepared once for all tests of this folder."""

import pytest
import tensorflow_datasets as tfds
from little_photos import LittlePhotos


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The version directory of little_photos."""
    builder = LittlePhotos(data_dir=str(tmp_path_factory.mktemp("photos")))
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")
    return str(builder.data_path)
