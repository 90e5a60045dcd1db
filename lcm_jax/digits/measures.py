"""What the captioned digits are evaluated on, and with: prompts, noise, real pictures, and the score of pictures.

Everything here is fixed by seeds, so each row of a table has the same prompts and starts from the same noise.
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
    """One picture that is asked for."""

    digit: int
    ink: str
    paper: str
    phrase: int

    @property
    def text(self) -> str:
        """The caption."""
        return caption(self.digit, self.ink, self.paper, self.phrase)

    @property
    def held_out(self) -> bool:
        """Whether no training picture has this pair of colours."""
        return (self.ink, self.paper) in HELD_OUT_PAIRS


def test_prompts() -> list[Prompt]:
    """The 560 classes (10 digits, 56 colour pairs), each in two of the five phrasings."""
    return [
        Prompt(digit, *pair, (number + digit + 2 * time) % len(PHRASES))
        for time in range(2)
        for number, pair in enumerate(ALL_PAIRS)
        for digit in range(10)
    ]


def validation_prompts() -> list[Prompt]:
    """240 classes, each colour pair that training has seen with every other digit: guidance is chosen with these."""
    return [
        Prompt(digit, *pair, (number + digit + 4) % len(PHRASES))
        for number, pair in enumerate(SEEN_PAIRS)
        for digit in range(number % 2, 10, 2)
    ]


def sheet_prompts() -> list[Prompt]:
    """Four classes, two of them of held-out colours, four times each: what is one model's variety, and its average."""
    classes = (
        (7, "red", "blue"),
        (3, "white", "black"),
        (5, *HELD_OUT_PAIRS[0]),
        (4, *HELD_OUT_PAIRS[-1]),
    )
    return [Prompt(*each, 0) for each in classes for _ in range(4)]


def real_pictures(prompts: Sequence[Prompt], split: str, style: str = "upright") -> UInt8[np.ndarray, "n 32 32 3"]:
    """Real digits of a split, drawn as the prompts ask, anywhere; a digit's pictures take turns."""
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
    """Standard normal float32; the same whatever the batch size is."""
    return np.random.default_rng(seed).standard_normal((count, *shape), np.float32)


def later_noise(steps: int, count: int, shape: Sequence[int], seed: int) -> Float[np.ndarray, "s n h w c"]:
    """What a consistency model adds between its `steps` steps: (steps - 1, count, …)."""
    return np.random.default_rng(seed).standard_normal((steps - 1, count, *shape), np.float32)


@dataclasses.dataclass(frozen=True)
class Share:
    """right out of count."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Wilson (JASA 22, 1927), which stays within 0 … 1; rounding alone is clipped."""
        z, n, p = 1.959964, self.count, self.value
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


@dataclasses.dataclass(frozen=True)
class Score:
    """How good a set of pictures is.

    Attributes:
      prompt: digit, ink and paper all as asked; seen, held_out: the same by kind of colour pair.
      digit: the digit alone; colours: both colours.
      frechet: to the real test pictures; a distance, small is good.
      variety: how much pictures of one prompt differ, in features, as a share of how much real ones do; among prompts
        that are drawn right each time, so that a mistake isn't variety. None if no prompt is there twice.
      style: drawn in the style that is wanted; None where none is.
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
    """Scores pictures against their prompts, and their features against those of equally many real pictures.

    With a style, which the classifier must have been trained for, it is counted how many pictures have it.
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
    """The variance within a class, averaged over classes and features, as a share of the real pictures'."""
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
