import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import open_data
from lcm_jax.data.sources.base import LONGEST_CAPTION
from lcm_jax.data.sources.tfds import TfdsSource
from lcm_jax.errors import UserError

PHOTOS = {"image_key": "photo", "caption_key": "title"}


def message(**arguments):
    with pytest.raises(UserError) as caught:
        open_data(DataConfig(**arguments))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_reads_encoded_images_and_captions(digits_data_dir):
    source = open_data(DataConfig(data_dir=digits_data_dir, split="validation"))
    assert len(source) == 800
    (image, captions), (_, others) = source.read([5, 700])
    assert image.startswith(b"\x89PNG")
    assert isinstance(captions[0], str)
    assert len(captions) == 1
    assert captions != others
    assert source.read([700])[0][1] == others
    assert len(open_data(DataConfig(data_dir=digits_data_dir, split="validation[:10%]+test"))) == 80 + 2376


@pytest.mark.parametrize(("key", "count"), [("title", 1), ("captions/text", 3), ("tags", 1)])
def test_directory_with_other_keys(photos, key, count):
    source = open_data(DataConfig(directory=photos, image_key="photo", caption_key=key))
    (_, captions), (_, second) = source.read([0, 5])
    assert len(captions) == len(second) == count
    assert captions != second


def test_record_without_caption(photos):
    source = open_data(DataConfig(directory=photos, image_key="photo", caption_key="tags"))
    (empty,) = [i for i in range(12) if _fails(source, i)]
    with pytest.raises(UserError, match=f"record {empty} has no caption in 'tags'"):
        source.read([empty, 0])


def _fails(source, index):
    try:
        source.read([index])
    except UserError:
        return True
    return False


@pytest.mark.parametrize(
    ("stored", "read"),
    [
        ("夕焼け 🦄".encode(), "夕焼け 🦄"),
        (b"caf\xe9 at night", "caf\ufffd at night"),
        ("夕焼け".encode()[:-1], "夕焼\ufffd"),
        ("a\ud83db", "a\ufffdb"),
        ("\ud83e\udd84", "🦄"),
        (b"a\x00b", "a\x00b"),
        (b"", ""),
        ("x" * 5000, "x" * 5000),
        (b"x" * 10**6, "x" * LONGEST_CAPTION),
    ],
)
def test_odd_captions(stored, read):
    source = TfdsSource(
        "odd", [{"image": b"", "caption": stored}, {"image": b"", "caption": [b"a", stored]}], "image", "caption", {}
    )
    assert [captions for _, captions in source.read([0, 1])] == [[read], ["a", read]]
    read.encode()  # as tokenizers and TFDS do


def test_unknown_name(digits_data_dir):
    assert "did you mean 'captioned_digits'?" in message(dataset="captioned_digit", data_dir=digits_data_dir)
    assert "'qqqq' is not registered" in message(dataset="qqqq", data_dir=digits_data_dir)
    assert "9.9.9" in message(dataset="captioned_digits:9.9.9", data_dir=digits_data_dir)


def test_directory_that_is_no_data_set(digits_data_dir, tmp_path):
    assert "does not exist" in message(directory=str(tmp_path / "nowhere"))
    assert "has no dataset_info.json" in message(directory=str(tmp_path))
    for above in (digits_data_dir, f"{digits_data_dir}/captioned_digits"):
        assert f"did you mean {digits_data_dir}/captioned_digits/2.0.0?" in message(directory=above)


def test_missing_key_names_those_that_are_there(photos):
    text = message(directory=photos, image_key="foto", caption_key="title")
    assert "config.data.image_key 'foto'" in text
    assert "did you mean 'photo'? (it has captions, depth, mask, photo, size, tags, title)" in text
    assert "captions, depth, mask" in message(directory=photos, image_key="photo", caption_key="zzzz")
    assert "not text" in message(directory=photos, image_key="photo", caption_key="size")
    assert "not text" in message(directory=photos, image_key="photo", caption_key="captions/id")
    assert "not text" in message(directory=photos, image_key="photo", caption_key="captions")
    assert "'captions/txt' is not in" in message(directory=photos, image_key="photo", caption_key="captions/txt")
    assert "not an 8-bit Image" in message(directory=photos, image_key="title", caption_key="title")
    assert "not an 8-bit Image" in message(directory=photos, image_key="depth", caption_key="title")


def test_splits(photos):
    assert "no split 'trian'; did you mean 'train'?" in message(directory=photos, split="trian", **PHOTOS)
    assert "no split 'trian'" in message(directory=photos, split="train+trian[:3]")  # reported before the keys
    assert "is empty" in message(directory=photos, split="train[:0]", **PHOTOS)
    assert "cannot be read" in message(directory=photos, split="train[5", **PHOTOS)
    assert len(open_data(DataConfig(directory=photos, split="train[:50%]", **PHOTOS))) == 6


def edited(photos, tmp_path, **changes):
    """Returns a copy of the data set with changed values in dataset_info.json."""
    copy = tmp_path / "2.0.0"
    shutil.copytree(photos, copy)
    file = copy / "dataset_info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return copy


def test_other_file_format(photos, tmp_path):
    text = message(directory=str(edited(photos, tmp_path, fileFormat="tfrecord")), **PHOTOS)
    assert "holds tfrecord files, not array_record" in text
    assert "--out_file_format=array_record" in text


def test_damaged_files(photos, tmp_path):
    copy = edited(photos, tmp_path)
    (shard,) = copy.glob("*train*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert "split 'train': record 0 cannot be read" in message(directory=str(copy), **PHOTOS)
    shard.unlink()
    assert f"misses {shard.name}" in message(directory=str(copy), **PHOTOS)
    (copy / "dataset_info.json").write_text("{")
    assert "description cannot be read" in message(directory=str(copy), **PHOTOS)


def test_flipped_bit_names_its_record(photos, tmp_path):
    copy = edited(photos, tmp_path)
    (shard,) = copy.glob("*train*")
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1  # in one of the first records
    shard.write_bytes(data)
    source = open_data(DataConfig(directory=str(copy), **PHOTOS))
    (damaged,) = [i for i in range(12) if _fails(source, i)]
    with pytest.raises(UserError, match=f"record {damaged} cannot be read"):
        source.read(range(12))


def test_data_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "not writable" in message(dataset="captioned_digits", data_dir=str(tmp_path / "file"))


def test_failed_preparation_leaves_nothing(tmp_path, monkeypatch):
    from lcm_jax.digits import dataset

    def broken(*_):
        raise ValueError("two\nlines")

    monkeypatch.setattr(dataset, "caption", broken)
    text = message(dataset="captioned_digits", data_dir=str(tmp_path))
    assert "cannot be prepared" in text
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [".lock"]
    assert [p.name for p in (tmp_path / "captioned_digits").iterdir()] == [".lock"]


PREPARE = """
import sys
from lcm_jax.digits import dataset
dataset.PAIRS_PER_IMAGE.update(train=1, validation=1, test=1)  # a small set, to save time
dataset.HELD_OUT_PER_IMAGE.update(test=0)
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import open_data
print(len(open_data(DataConfig(data_dir=sys.argv[1]))))
"""


def test_killed_then_two_at_once(tmp_path):
    """Leftovers of a killed process are removed; of two processes that start together, one "
    "prepares, the other waits."""

    def start():
        command = [sys.executable, "-c", PREPARE, str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    killed = start()
    deadline = time.time() + 60
    while not list(Path(tmp_path).glob("captioned_digits/incomplete.*")) and time.time() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert list(Path(tmp_path).glob("captioned_digits/incomplete.*"))
    assert not (tmp_path / "captioned_digits" / "2.0.0").exists()

    both = [start(), start()]
    outputs = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["1300\n", "1300\n"]
    assert sorted(err.count("preparing") for _, err in outputs) == [0, 1]
    assert sorted(p.name for p in (tmp_path / "captioned_digits").iterdir()) == [".lock", "2.0.0"]
