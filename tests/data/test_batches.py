import contextlib
import dataclasses
import json
import threading

import numpy as np
import pytest

from lcm_jax.data.batches import batches
from lcm_jax.data.config import DataConfig
from lcm_jax.data.sources import open_data
from lcm_jax.errors import UserError


def tokenize(captions):
    """Encodes a caption as its characters, so that ids identify it."""
    return np.asarray([np.frombuffer(c.encode().ljust(64)[:64], np.uint8) for c in captions], np.int32)


def text_of(ids):
    return ["".join(map(chr, row)).strip() for row in ids]


def take(config, count, *, batch_size=8, seed=0, **options):
    made = batches(config, tokenize=tokenize, batch_size=batch_size, seed=seed, **options)
    result = [next(made) for _ in range(count)]
    made.close()
    return result


def equal(a, b):
    return all(np.array_equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("image", "input_ids"))


@pytest.fixture(scope="session")
def config(digits_data_dir):
    return DataConfig(data_dir=digits_data_dir, crop="random", flip=True, image_size=24)


@pytest.fixture(scope="session")
def photo_config(photos):
    return DataConfig(directory=photos, image_key="photo", caption_key="title", image_size=20, shuffle=False)


def test_shapes_and_types(config):
    (batch,) = take(config, 1)
    assert set(batch) == {"image", "input_ids"}
    assert (batch["image"].shape, batch["image"].dtype) == ((8, 24, 24, 3), np.uint8)
    assert (batch["input_ids"].shape, batch["input_ids"].dtype) == ((8, 64), np.int32)


def test_images_stay_with_their_captions(photo_config):
    for batch in take(dataclasses.replace(photo_config, shuffle=True), 3):
        for image, caption in zip(batch["image"], text_of(batch["input_ids"]), strict=True):
            assert caption == f"photo {image[0, 0, 2] // 10}"


@pytest.mark.parametrize("parts", [[range(8)], [range(4), range(4, 8)], [[0, 1, 6, 7], [2, 3], [4, 5]]])
def test_processes_share_the_global_batch(config, photo_config, parts):
    for each in (config, dataclasses.replace(photo_config, shuffle=True, flip=True, caption_key="captions/text")):
        whole = take(each, 3)
        for rows in parts:
            expected = [{name: array[list(rows)] for name, array in batch.items()} for batch in whole]
            assert equal(take(each, 3, rows=rows), expected)


def test_resume_continues_exactly(config):
    whole = take(config, 6)
    made = batches(config, tokenize=tokenize, batch_size=8, seed=0)
    for _ in range(3):
        next(made)
    state = json.loads(json.dumps(made.get_state()))
    assert state["step"] == 3
    made.close()

    again = batches(config, tokenize=tokenize, batch_size=8, seed=0)
    next(again)
    again.set_state(state)
    assert equal([next(again) for _ in range(3)], whole[3:])
    again.set_state(state | {"step": 1})
    assert equal([next(again)], whole[1:2])
    again.close()
    assert equal(take(config, 2, start_step=4), whole[4:])


def test_state_of_other_batches_is_refused(config):
    made = batches(config, tokenize=tokenize, batch_size=8, seed=0)
    for change in ({"seed": 1}, {"batch_size": 16}, {"examples": 3}):
        with pytest.raises(UserError, match=next(iter(change))):
            made.set_state(made.get_state() | change)
    made.close()


def test_batches_depend_on_seed_and_step(config):
    first, second = take(config, 2)
    assert not equal([first], [second])
    assert not equal([first], take(config, 1, seed=1))
    assert equal([first, second], take(config, 2))


def test_every_epoch_has_every_example_in_a_new_order(photo_config):
    for shuffle in (True, False):
        taken = take(dataclasses.replace(photo_config, shuffle=shuffle), 6, batch_size=6)
        captions = [text for batch in taken for text in text_of(batch["input_ids"])]
        epochs = [captions[i : i + 12] for i in (0, 12, 24)]
        assert all(len(set(epoch)) == 12 for epoch in epochs)
        assert (epochs[0] != epochs[1] != epochs[2]) == shuffle


def test_data_set_smaller_than_a_batch(photo_config):
    (batch,) = take(dataclasses.replace(photo_config, split="train[:1]"), 1, batch_size=4)
    assert len(set(text_of(batch["input_ids"]))) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"split": "train[6:]"},
        {"caption_key": "captions/text"},
        {"image_size": 24},
        {"resize": "bicubic"},
        {"crop": "random"},
        {"flip": True},
        {"shuffle": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_option_changes_the_batch(photo_config, change):
    assert not equal(take(photo_config, 1), take(dataclasses.replace(photo_config, **change), 1))


def test_options_that_choose_the_data_set(photo_config, digits_data_dir, tmp_path):
    digits = DataConfig(data_dir=digits_data_dir, split="validation", image_size=20)
    assert not equal(take(photo_config, 1), take(digits, 1))
    with pytest.raises(UserError, match="'no_such_set'"):
        take(dataclasses.replace(digits, dataset="no_such_set"), 1)
    with pytest.raises(UserError, match="not writable"):  # looked for there, and to be prepared there
        take(dataclasses.replace(digits, data_dir="/dev/null"), 1)
    with pytest.raises(UserError, match="image_key 'photo'"):
        take(dataclasses.replace(digits, image_key="photo"), 1)


def test_threads_change_no_batch(config):
    reference = take(config, 8)
    for change in ({"threads": 1}, {"threads": 7}):
        assert equal(take(dataclasses.replace(config, **change), 8), reference)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_work_at_the_same_time(photo_config, threads):
    """As many batches as there are threads wait for each other; one more would never be released."""
    together = threading.Barrier(threads)

    def wait(captions):
        together.wait(timeout=10)
        return tokenize(captions)

    made = batches(dataclasses.replace(photo_config, threads=threads), tokenize=wait, batch_size=4, seed=0)
    next(made)
    assert together.n_waiting < threads
    together.abort()
    made.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("max_pixels", 0),
        ("threads", 0),
        ("crop", "centre"),
        ("resize", "nearest"),
        ("split", ""),
        ("image_key", ""),
        ("caption_key", ""),
        ("dataset", ""),
    ],
)
def test_wrong_values_name_the_field(field, value):
    with pytest.raises(UserError, match=f"^{field}"):
        DataConfig(**{field: value})


def test_batch_size_and_seed_are_checked(config):
    for options, what in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
    ):
        with pytest.raises(UserError, match=what):
            take(config, 1, **options)


def test_one_of_several_captions_is_drawn_each_time(photo_config):
    config = dataclasses.replace(photo_config, caption_key="captions/text", split="train[:1]")
    captions = text_of(take(config, 1, batch_size=60)[0]["input_ids"])
    counts = np.unique(captions, return_counts=True)[1]
    assert len(counts) == 3
    assert min(counts) > 8


def test_damaged_image_names_its_record(photo_config):
    with pytest.raises(UserError, match=r"split 'damaged': the image of record (\d+) cannot be decoded") as caught:
        take(dataclasses.replace(photo_config, split="damaged"), 2)
    assert "\n" not in str(caught.value)


def test_an_image_beyond_the_limit_names_its_record(photo_config):
    with pytest.raises(UserError, match=r"the image of record 0 cannot be decoded: it has 60 x 40 pixels, .*=2399"):
        take(dataclasses.replace(photo_config, max_pixels=2399), 1)
    assert equal(take(dataclasses.replace(photo_config, max_pixels=2400), 2), take(photo_config, 2))


def test_a_caption_without_token_ids_is_named(photo_config):
    def refuse(captions):
        if "photo 5" in captions:
            raise UserError("no embedding for 5")
        return tokenize(captions)

    source = open_data(photo_config)
    number = [captions for _, captions in source.read(range(len(source)))].index(["photo 5"])
    made = batches(photo_config, tokenize=refuse, batch_size=12, seed=0)
    with contextlib.closing(made), pytest.raises(UserError, match=f"caption of record {number}: no embedding for 5"):
        next(made)
