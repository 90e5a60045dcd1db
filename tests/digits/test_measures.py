"""Tests of the prompts, noise, real images and scores of the evaluation."""

import collections
import functools

import numpy as np
import pytest

from lcm_jax.digits import evaluation_set
from lcm_jax.digits.dataset import (
    ALL_PAIRS,
    HELD_OUT_PAIRS,
    PHRASES,
    PLACES,
    SEEN_PAIRS,
    load_grids,
    render,
    split_images,
)
from lcm_jax.digits.evaluation_set import Prompt, first_noise, later_noise, real_images
from lcm_jax.digits.measures import Share, score
from lcm_jax.evaluation.frechet import frechet_distance

# ---- prompts


def classes(prompts):
    return collections.Counter((p.digit, p.ink, p.paper) for p in prompts)


def test_each_class_is_asked_for_twice():
    prompts = evaluation_set.test_prompts()
    assert len(prompts) == 1120
    assert classes(prompts) == {(digit, *pair): 2 for digit in range(10) for pair in ALL_PAIRS}
    assert len({p.text for p in prompts}) == 1120  # the two of a class differ in phrasing
    assert collections.Counter(p.phrase for p in prompts) == dict.fromkeys(range(len(PHRASES)), 224)
    assert sum(p.held_out for p in prompts) == 160


def test_validation_has_no_held_out_pair():
    prompts = evaluation_set.validation_prompts()
    assert len(prompts) == len(classes(prompts)) == 240
    assert collections.Counter((p.ink, p.paper) for p in prompts) == dict.fromkeys(SEEN_PAIRS, 5)
    assert collections.Counter(p.digit for p in prompts) == dict.fromkeys(range(10), 24)
    assert collections.Counter(p.phrase for p in prompts) == dict.fromkeys(range(len(PHRASES)), 48)


def test_the_sheet_has_four_images_of_each_of_its_classes():
    prompts = evaluation_set.sheet_prompts()
    assert list(classes(prompts).values()) == [4] * 4
    assert [p.held_out for p in prompts[::4]] == [False, False, True, True]
    assert all(p == prompts[i // 4 * 4] for i, p in enumerate(prompts))


def test_prompts_are_for_ever():
    """Must never change: stored rows are compared with new ones."""
    prompts = evaluation_set.test_prompts()
    assert prompts[0].text == "a black zero on a white background"
    assert prompts[777].text == "a green seven on a black background"
    assert prompts[1119].text == "the digit nine in magenta on cyan"
    assert evaluation_set.validation_prompts()[123].text == "a picture of the digit six in blue on a black background"


# ---- noise


@pytest.mark.parametrize("noise", [first_noise, functools.partial(later_noise, 3)])
def test_noise_is_standard_normal_and_fixed(noise):
    noises = noise(300, (4, 4, 2), 0)
    assert noises.shape[-4:] == (300, 4, 4, 2)
    assert noises.dtype == np.float32
    np.testing.assert_allclose([noises.mean(), noises.std()], [0, 1], atol=0.03)
    np.testing.assert_array_equal(noise(300, (4, 4, 2), 0), noises)
    assert (noise(300, (4, 4, 2), 1) != noises).any()


def test_noises_differ_from_one_another():
    first, later = first_noise(2, (3, 3, 1), 0), later_noise(3, 2, (3, 3, 1), 1)
    assert later.shape == (2, 2, 3, 3, 1)
    assert later_noise(1, 2, (3, 3, 1), 0).shape == (0, 2, 3, 3, 1)
    assert len({x.tobytes() for x in (*first, *later[0], *later[1])}) == 6


def test_first_noise_of_an_image_is_the_same_however_many_there_are():
    np.testing.assert_array_equal(first_noise(7, (3, 3, 2), 0)[:4], first_noise(4, (3, 3, 2), 0))


# ---- real images

PLACED = [(row, column) for row in range(PLACES) for column in range(PLACES)]


def test_real_images_are_of_their_split_and_take_turns():
    grids, real = load_grids()
    rendered = {}
    for split, members in split_images(real).items():
        threes = members[real[members] == 3]
        images = real_images([Prompt(3, "white", "black", 0)] * (len(threes) + 2), split)
        places = set()
        for image, i in zip(images, [*threes, *threes[:2]], strict=True):
            (place,) = (at for at in PLACED if (render(grids[i], "white", "black", at) == image).all())
            places.add(place)
        assert len(places) > min(len(threes), 81) / 2
        rendered[split] = {image.tobytes() for image in images}
    assert not rendered["train"] & rendered["test"]
    assert not rendered["validation"] & rendered["test"]


def test_real_images_are_as_asked(classifier):
    prompts = evaluation_set.test_prompts()[::4]
    found = score(real_images(prompts, "test"), prompts, classifier, np.zeros((280, 64), np.float32))
    assert found["colours"].value == 1
    assert found.prompt.value == found["digit"].value > 0.98


# ---- shares


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval(right, count, low, high):
    assert Share(right, count).interval == pytest.approx((low, high), abs=5e-5)
    assert Share(count - right, count).interval == pytest.approx((1 - high, 1 - low), abs=5e-5)
    assert Share(right, count).value == right / count


def test_an_interval_stays_within_zero_and_one():
    """Rounding errors would appear as -0.0 in a table."""
    for n in range(1, 300):
        assert Share(0, n).interval[0] >= 0
        assert Share(n, n).interval[1] <= 1


# ---- scores

ASKED = [Prompt(7, "red", "blue", 0), Prompt(3, "white", "black", 1), Prompt(5, *HELD_OUT_PAIRS[0], 2)]
FEATURES = np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32)


def scored(*, sampled=ASKED, reads=(7, 3, 5)):
    """Scores real images of the prompts `sampled` against ASKED, with a classifier that predicts `reads`."""

    def classifier(images):
        return FEATURES[0], np.array(reads)

    return score(real_images(sampled, "train"), ASKED, classifier, FEATURES[1])


SHARES = ("prompt", "seen", "held_out", "digit", "colours")


def rights(of):
    return [of[name].right for name in SHARES]


def test_images_as_asked_are_right():
    found = scored()
    assert rights(found) == [3, 2, 1, 3, 3]
    assert [found[name].count for name in SHARES] == [3, 2, 1, 3, 3]
    assert found.frechet == frechet_distance(FEATURES[0], FEATURES[1])


def test_a_wrong_digit():
    assert rights(scored(reads=(1, 3, 5))) == [2, 1, 1, 2, 3]
    assert rights(scored(reads=(7, 3, 6))) == [2, 2, 0, 2, 3]


@pytest.mark.parametrize(("ink", "paper"), [("red", "green"), ("green", "blue"), ("blue", "red")])
def test_wrong_paper_wrong_ink_and_a_swap_of_both(ink, paper):
    assert rights(scored(sampled=[Prompt(7, ink, paper, 0), *ASKED[1:]])) == [2, 1, 1, 3, 2]


def test_the_wrong_halves_of_two_images_are_two_wrong_images():
    found = scored(sampled=[Prompt(7, "blue", "red", 0), *ASKED[1:]], reads=(7, 4, 5))
    assert rights(found) == [1, 0, 1, 2, 2]


def test_variety_is_the_variance_within_a_prompt_that_is_drawn_right():
    asked = [ASKED[0], ASKED[1], ASKED[0], ASKED[1]]
    offsets = np.array([0, 5, 2, 9], np.float32)  # variances 2 and 8
    real = np.array([0, 7, 4, 7], np.float32)  # variances 8 and 0

    def variety(reads):
        def classifier(images):
            return np.repeat(offsets[:, None], 64, 1), np.array(reads)

        return score(real_images(asked, "test"), asked, classifier, np.repeat(real[:, None], 64, 1))["variety"]

    assert variety((7, 3, 7, 3)) == pytest.approx((2 + 8) / (8 + 0))
    assert variety((7, 3, 7, 4)) == pytest.approx(2 / 8)
    assert variety((7, 3, 1, 4)) is None
    assert scored()["variety"] is None  # no prompt occurs twice


def test_without_held_out_prompts():
    def classifier(images):
        return FEATURES[0, :2], np.array([7, 3])

    found = score(real_images(ASKED[:2], "test"), ASKED[:2], classifier, FEATURES[1, :2])
    assert found["held_out"] is None
    assert found["seen"] == found.prompt == Share(2, 2)
