"""Tests that the colours read from the pixels are those of the image."""

import numpy as np
import pytest

from lcm_jax.digits.colours import NAMES, read_colours
from lcm_jax.digits.dataset import ALL_PAIRS, COLOURS, coverage, load_grids, render, split_images


@pytest.fixture(scope="module")
def grids():
    """Grids of the real test images."""
    grids, digits = load_grids()
    return grids[split_images(digits)["test"]]


def read(*images):
    ink, paper = read_colours(np.stack(images))
    return [("" if i < 0 else NAMES[i], NAMES[p]) for i, p in zip(ink, paper, strict=True)]


def test_every_pair_of_colours_is_read_from_real_digits(grids):
    for number, pair in enumerate(ALL_PAIRS):
        some = grids[number % 4 :: 4]
        corner = (number % 9, number // 9)  # including the edges
        assert read(*(render(grid, *pair, corner) for grid in some)) == [pair] * len(some)


def test_an_image_of_one_colour_has_no_ink():
    flat = [np.full((32, 32, 3), colour, np.uint8) for colour in COLOURS.values()]
    assert read(*flat) == [("", name) for name in COLOURS]
    grey = np.uint8([[[90, 160, 200]]])  # closest to cyan
    assert read(np.tile(grey, (32, 32, 1))) == [("", "cyan")]


def test_noise_that_leaves_each_pixel_nearest_to_its_colour(grids):
    inked = coverage(grids[:20], 32)[..., None] > 0.5
    noise = np.random.default_rng(0).integers(0, 120, (20, 32, 32, 3))
    noisy = np.where(inked, COLOURS["yellow"], COLOURS["blue"])
    noisy = np.where(noisy > 0, noisy - noise, noisy + noise).astype(np.uint8)
    assert read(*noisy) == [("yellow", "blue")] * 20


def test_the_commonest_colour_beside_the_paper_is_the_ink(grids):
    image = render(grids[0], "red", "blue")
    spot = image.copy()
    spot[12:16, 12:16] = COLOURS["green"]
    inked = (image == COLOURS["red"]).all(-1).sum()
    assert inked > 16
    much = image.copy()
    much[4:28, 4:28] = COLOURS["green"]
    assert read(spot, much) == [("red", "blue"), ("green", "blue")]


def test_the_paper_is_what_frames_the_image():
    """Even if most of the image is ink, or ink reaches the edge."""
    image = np.full((32, 32, 3), COLOURS["cyan"], np.uint8)
    image[2:30, 2:30] = COLOURS["black"]
    touched = image.copy()
    touched[:, 8:20] = COLOURS["black"]
    assert read(image, touched) == [("black", "cyan")] * 2
