"""Prompts, noise, real images and scores for evaluating models of the captioned digits.

Everything is seeded, so all rows of a table have the same prompts and the same initial noise.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from lcm_jax.digits.classifier import Classifier
from lcm_jax.digits.colours import NAMES, read_colours
from lcm_jax.digits.dataset import (
    ALL_PAIRS,
    HELD_OUT_PAIRS,
    PHRASES,
    PLACES,
    SEEN_PAIRS,
    SPLITS,
    STYLES,
    caption,
    draw,
    load_grids,
    split_pictures,
)
from lcm_jax.evaluation.frechet import frechet_distance

SEED = 20231006


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A requested image: digit, colours and phrasing."""

    digit: int
    ink: str
    paper: str
    phrase: int

    @property
    def text(self) -> str:
        """The caption of the requested image."""
        return caption(self.digit, self.ink, self.paper, self.phrase)

    @property
    def held_out(self) -> bool:
        """Whether no training image has this colour pair."""
        return (self.ink, self.paper) in HELD_OUT_PAIRS


def test_prompts() -> list[Prompt]:
    """Returns the 560 classes (10 digits, 56 colour pairs), each in two of the five phrasings."""
    return [
        Prompt(digit, *pair, (number + digit + 2 * time) % len(PHRASES))
        for time in range(2)
        for number, pair in enumerate(ALL_PAIRS)
        for digit in range(10)
    ]


def validation_prompts() -> list[Prompt]:
    """Returns 240 classes for choosing guidance: each colour pair of the training split with five digits."""
    return [
        Prompt(digit, *pair, (number + digit + 4) % len(PHRASES))
        for number, pair in enumerate(SEEN_PAIRS)
        for digit in range(number % 2, 10, 2)
    ]


def sheet_prompts() -> list[Prompt]:
    """Returns four classes, two of them with held-out colours, four times each to show a model's variety."""
    classes = (
        (7, "red", "blue"),
        (3, "white", "black"),
        (5, *HELD_OUT_PAIRS[0]),
        (4, *HELD_OUT_PAIRS[-1]),
    )
    return [Prompt(*each, 0) for each in classes for _ in range(4)]


def real_pictures(prompts: Sequence[Prompt], split: str, style: str = "upright") -> UInt8[np.ndarray, "n 32 32 3"]:
    """Renders real digits of a split to match the prompts, at random places, cycling through each digit's images."""
    grids, digits = load_grids()
    places = np.random.default_rng([SEED, list(SPLITS).index(split)]).integers(PLACES, size=(len(prompts), 2))
    members = split_pictures(digits)[split]
    of_digit = [members[digits[members] == digit] for digit in range(10)]
    turn = [0] * 10
    pictures = []
    for prompt, (row, column) in zip(prompts, places.tolist(), strict=True):
        mine = of_digit[prompt.digit]
        grid = grids[mine[turn[prompt.digit] % len(mine)]]
        pictures.append(draw(grid, prompt.ink, prompt.paper, (row, column), style))
        turn[prompt.digit] += 1
    return np.stack(pictures)


def first_noise(count: int, shape: Sequence[int], seed: int) -> Float[np.ndarray, "n h w c"]:
    """Returns standard normal float32 noise; image i gets the same noise for every `count`."""
    return np.random.default_rng(seed).standard_normal((count, *shape), np.float32)


def later_noise(steps: int, count: int, shape: Sequence[int], seed: int) -> Float[np.ndarray, "s n h w c"]:
    """Returns the noise that a consistency model adds between steps, float32 (steps - 1, count, …)."""
    return np.random.default_rng(seed).standard_normal((steps - 1, count, *shape), np.float32)


@dataclasses.dataclass(frozen=True)
class Share:
    """A proportion: `right` out of `count`."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval (JASA 22, 1927), clipped to 0 … 1 against rounding errors."""
        z, n, p = 1.959964, self.count, self.value
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


@dataclasses.dataclass(frozen=True)
class Score:
    """Scores of a set of images.

    Attributes:
      prompt: digit, ink and paper all right; seen, held_out: the same for those colour pairs only.
      digit: the digit right; colours: both colours right.
      frechet: Fréchet distance to the features of real images; lower is better.
      variety: feature variance within a class relative to real images. Only classes with several images, all of them
        right, count, so that a mistake isn't variety. None if there are none, or if the real variance is zero.
      style: the style right; None if no style was requested.
    """

    prompt: Share
    seen: Share
    held_out: Share | None
    digit: Share
    colours: Share
    frechet: float
    variety: float | None = None
    style: Share | None = None


def score(
    images: UInt8[np.ndarray, "n 32 32 3"],
    prompts: Sequence[Prompt],
    classifier: Classifier,
    real_features: Float[np.ndarray, "n 64"],
    style: str | None = None,
) -> Score:
    """Scores images against their prompts, and their features against those of equally many real images.

    With a `style`, images in that style are counted too; the classifier must be trained with styles.
    """
    features, digits = classifier(images)
    ink, paper = read_colours(images)
    digit_right = digits == [p.digit for p in prompts]
    colours_right = (ink == [NAMES.index(p.ink) for p in prompts]) & (paper == [NAMES.index(p.paper) for p in prompts])
    right, held_out = digit_right & colours_right, np.array([p.held_out for p in prompts])

    def share(of: np.ndarray) -> Share:
        return Share(int(of.sum()), len(of))

    return Score(
        share(right),
        share(right[~held_out]),
        share(right[held_out]) if held_out.any() else None,
        share(digit_right),
        share(colours_right),
        frechet_distance(features, real_features),
        _variety(features, real_features, prompts, right),
        share(classifier.styles(images) == STYLES.index(style)) if style else None,
    )


def _variety(features: np.ndarray, real: np.ndarray, prompts: Sequence[Prompt], right: np.ndarray) -> float | None:
    """Returns the variance within a class, averaged over classes and features, divided by that of real images."""
    members: dict[tuple[int, str, str], list[int]] = {}
    for number, prompt in enumerate(prompts):
        members.setdefault((prompt.digit, prompt.ink, prompt.paper), []).append(number)
    classes = [numbers for numbers in members.values() if len(numbers) > 1 and right[numbers].all()]
    if not classes:
        return None
    drawn, real_ones = (
        np.mean([of[numbers].astype(np.float64).var(0, ddof=1) for numbers in classes]) for of in (features, real)
    )
    return float(drawn / real_ones) if real_ones > 0 else None
