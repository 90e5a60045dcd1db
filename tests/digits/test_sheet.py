"""Tests the placement of images, row names and prompts on the sheet."""

import numpy as np

from lcm_jax.digits.sheet import HEAD, LEFT, sheet
from lcm_jax.host.images import GAP

RANDOM = np.random.default_rng(0)
ROWS = {name: RANDOM.integers(0, 256, (3, 8, 10, 3), dtype=np.uint8) for name in ("real", "student")}
PROMPTS = ["a", "a", "b"]


def test_images_are_in_their_places():
    for scale in (1, 3):
        made = sheet(ROWS, PROMPTS, scale)
        height, width = 8 * scale + GAP, 10 * scale + GAP
        assert made.shape == (HEAD + 2 * height - GAP, LEFT + 3 * width - GAP, 3)
        for i, row in enumerate(ROWS.values()):
            for j, image in enumerate(row):
                top, left = HEAD + i * height, LEFT + j * width
                found = made[top : top + height - GAP, left : left + width - GAP]
                np.testing.assert_array_equal(found, image.repeat(scale, 0).repeat(scale, 1))


def ink(part):
    return (part < 128).any((-1, -2))


def test_each_row_has_its_name_at_its_left():
    rows = {name: np.full((1, 20, 20, 3), 255, np.uint8) for name in ("one", "", "three")}
    made = sheet(rows, ["x"], 1)
    left = ink(made[HEAD:, :LEFT])
    assert left[:20].any()
    assert not left[20 + GAP : 40 + GAP].any()
    assert left[40 + 2 * GAP :].any()
    other = sheet({("ten" if name == "three" else name): row for name, row in rows.items()}, ["x"], 1)
    changed = (other != made).any((1, 2))
    assert changed.any()
    assert not changed[: HEAD + 40 + 2 * GAP].any()


def test_equal_neighbours_share_one_prompt_in_their_middle():
    rows = {"": np.full((3, 20, 40, 3), 255, np.uint8)}
    head = sheet(rows, ["same", "same", "x"], 1)[:HEAD, LEFT:]
    columns = np.flatnonzero((head < 128).any((0, 2)))
    width = 40 + GAP
    shared = columns[columns < 2 * width]
    assert abs(shared.mean() - width) < 3
    assert shared.min() > 0.5 * width
    assert shared.max() < 1.5 * width
    assert abs(columns[columns > 2 * width].mean() - 2.5 * width) < 3
