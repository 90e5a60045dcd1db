"""Image grids, and PNG files that are written completely or not at all."""

import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from lcm_jax.errors import UserError
from lcm_jax.host.images import GAP, LABEL, grid, write_png


def noise_images(n, h=6, w=40):
    """Images that differ in every pixel, without white."""
    return np.random.default_rng(0).integers(0, 255, (n, h, w, 3), dtype=np.uint8)


def test_row_by_row_with_gaps():
    images = noise_images(5)
    sheet = grid(images, columns=3)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 6 + GAP, 3 * 40 + 2 * GAP, 3)
    expected = np.full_like(sheet, 255)
    for i, (top, left) in enumerate([(0, 0), (0, 42), (0, 84), (8, 0), (8, 42)]):
        expected[top : top + 6, left : left + 40] = images[i]
    np.testing.assert_array_equal(sheet, expected)


def test_fewer_images_than_columns_take_less_room():
    images = noise_images(2)
    assert grid(images, columns=8).shape == (6, 2 * 40 + GAP, 3)
    np.testing.assert_array_equal(grid(images[:1]), images[0])


def test_scale_repeats_pixels():
    images = noise_images(3)
    sheet = grid(images, columns=2, scale=3)
    assert sheet.shape == (2 * 18 + GAP, 2 * 120 + GAP, 3)
    np.testing.assert_array_equal(sheet[:18, :120], np.kron(images[0], np.ones((3, 3, 1), np.uint8)))
    np.testing.assert_array_equal(sheet[20:38:3, 0:120:3], images[2])


def test_labels_stand_below_their_images_and_inside_their_columns():
    images = noise_images(3)
    sheet = grid(images, columns=2, labels=["a red seven on a blue background", "", "two\nlines"])
    assert sheet.shape == (2 * (6 + LABEL) + GAP, 2 * 40 + GAP, 3)
    np.testing.assert_array_equal(sheet[:6, :40], images[0])
    np.testing.assert_array_equal(sheet[:6, 42:], images[1])
    np.testing.assert_array_equal(sheet[22:28, :40], images[2])
    assert (sheet[6:20, :40] < 128).any()  # ink
    assert (sheet[6:22, 42:] == 255).all()  # the long label is cut; the empty one has none
    assert (sheet[28:, :40] < 128).any()
    assert sheet[28:].shape[0] == LABEL


def test_labels_differ():
    images = noise_images(2)
    sheet = grid(images, columns=2, labels=["seven", "three"])
    assert (sheet[6:, :40] != sheet[6:, 42:]).any()


def test_one_label_an_image():
    with pytest.raises(ValueError):
        grid(noise_images(3), labels=["one", "two"])


def test_png_holds_the_image(tmp_path):
    image = noise_images(1)[0]
    path = tmp_path / "new" / "folder" / "x.png"
    write_png(path, image)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image)
    assert os.listdir(path.parent) == ["x.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_png_replaces_an_older_one(tmp_path):
    write_png(tmp_path / "x.png", noise_images(1)[0])
    write_png(tmp_path / "x.png", noise_images(2)[1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), noise_images(2)[1])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_older_file_and_nothing_else(tmp_path, monkeypatch, error):
    write_png(tmp_path / "x.png", noise_images(1)[0])
    before = (tmp_path / "x.png").read_bytes()

    def fail(self, content):
        with open(self, "wb") as file:
            file.write(content[: len(content) // 2])
        raise error

    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        write_png(tmp_path / "x.png", noise_images(2)[1])
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path}/x.png can't be written: No space left on device"
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == before


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"file/x.png can't be written: .*/file is a file$"):
        write_png(tmp_path / "file" / "x.png", noise_images(1)[0])
    with pytest.raises(UserError, match=r"file/folder/x.png can't be written: Not a directory$"):
        write_png(tmp_path / "file" / "folder" / "x.png", noise_images(1)[0])
    with pytest.raises(UserError, match=r"folder.png can't be written: Is a directory$"):
        write_png(tmp_path / "folder.png", noise_images(1)[0])
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_texts_in_a_png(tmp_path):
    """Latin-1 is in tEXt chunks, all else in iTXt; bytes that are no UTF-8 are escaped."""
    texts = {"prompt": "café, 50 %\nrouge", "command": "sample --prompt=七 --out=\udce9.png"}
    write_png(tmp_path / "x.png", noise_images(1)[0], texts)
    with Image.open(tmp_path / "x.png") as image:
        assert image.text == {**texts, "command": "sample --prompt=七 --out=\\udce9.png"}
    data = (tmp_path / "x.png").read_bytes()
    assert (data.count(b"tEXtprompt"), data.count(b"iTXtcommand")) == (1, 1)
