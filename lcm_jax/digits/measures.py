"""Scores of images of the captioned digits."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from lcm_jax.digits.classifier import Classifier
from lcm_jax.digits.colours import NAMES, read_colours
from lcm_jax.digits.dataset import STYLES
from lcm_jax.digits.evaluation_set import Prompt
from lcm_jax.evaluation.frechet import frechet_distance


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
