"""Metrics of images of the captioned digits: one table, from which scores, JSON and report columns follow."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

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


Value = Share | float | None  # None: it cannot be measured on these images, or was not when they were recorded


@dataclasses.dataclass(frozen=True)
class Given:
    """What a metric may use: images, their prompts, and what the classifier and the colour reading found.

    Attributes:
      features, real_features: classifier features of the images, and of equally many real images.
      held_out: whether no training image has the prompt's colour pair.
      style_right: None if no style was requested.
    """

    images: UInt8[np.ndarray, "n 32 32 3"]
    prompts: Sequence[Prompt]
    features: Float[np.ndarray, "n 64"]
    real_features: Float[np.ndarray, "n 64"]
    held_out: Bool[np.ndarray, " n"]
    digit_right: Bool[np.ndarray, " n"]
    colours_right: Bool[np.ndarray, " n"]
    style_right: Bool[np.ndarray, " n"] | None

    @property
    def right(self) -> Bool[np.ndarray, " n"]:
        """Whether digit, ink and paper are all right."""
        return self.digit_right & self.colours_right


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
      name: its key in a Score and in JSON.
      measure: computes its value.
      columns: caption → format of the value, for each column of the report; without columns, it is in JSON only.
      against_real: whether it compares with the real images. Real images are then compared with other real ones.
      optional: whether its columns come last, and only in a report whose first row has a value.
    """

    name: str
    measure: Callable[[Given], Value]
    columns: Mapping[str, Callable[[Any], str]] = dataclasses.field(default_factory=dict)
    against_real: bool = False
    optional: bool = False


def _share(right: np.ndarray) -> Share:
    return Share(int(right.sum()), len(right))


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} %"


def _interval(share: Share) -> str:
    low, high = share.interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _held_out(given: Given) -> Share | None:
    return _share(given.right[given.held_out]) if given.held_out.any() else None


def _frechet(given: Given) -> float:
    return frechet_distance(given.features, given.real_features)


def _variety(given: Given) -> float | None:
    """Returns the variance within a class, averaged over classes and features, divided by that of real images.

    Only classes with several images, all of them right, count, so that a mistake isn't variety. None if there are
    none, or if the real variance is zero.
    """
    members: dict[tuple[int, str, str], list[int]] = {}
    for number, prompt in enumerate(given.prompts):
        members.setdefault((prompt.digit, prompt.ink, prompt.paper), []).append(number)
    classes = [numbers for numbers in members.values() if len(numbers) > 1 and given.right[numbers].all()]
    if not classes:
        return None
    sampled, real = (
        np.mean([of[numbers].astype(np.float64).var(0, ddof=1) for numbers in classes])
        for of in (given.features, given.real_features)
    )
    return float(sampled / real) if real > 0 else None


def _style(given: Given) -> Share | None:
    return None if given.style_right is None else _share(given.style_right)


# in the order of JSON and of the report
METRICS = (
    Metric("prompt", lambda given: _share(given.right), {"prompt right": _percent, "95 % interval": _interval}),
    Metric("seen", lambda given: _share(given.right[~given.held_out]), {"seen": _percent}),
    Metric("held_out", _held_out, {"held out": _percent}),
    Metric("digit", lambda given: _share(given.digit_right)),
    Metric("colours", lambda given: _share(given.colours_right)),
    Metric("frechet", _frechet, {"Fréchet": "{:.1f}".format}, against_real=True),
    Metric("variety", _variety, {"variety": "{:.2f}".format}, against_real=True),
    Metric("style", _style, {"style right": _percent}, optional=True),
)


@dataclasses.dataclass(frozen=True)
class Score:
    """Values of METRICS for a set of images: name → value. Values that are not passed are None.

    Raises: TypeError for a name that is no metric's, or without "prompt" and "frechet", which choose the guidance and
      are plotted.
    """

    values: Mapping[str, Value]

    def __post_init__(self) -> None:
        names = [metric.name for metric in METRICS]
        if unknown := self.values.keys() - names:
            raise TypeError(f"{min(unknown)!r} is not a metric")
        if not (isinstance(self.values.get("prompt"), Share) and isinstance(self.values.get("frechet"), int | float)):
            raise TypeError("a score needs 'prompt' and 'frechet'")
        object.__setattr__(self, "values", {name: self.values.get(name) for name in names})

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    @property
    def prompt(self) -> Share:
        """Images with digit, ink and paper all right."""
        return self["prompt"]

    @property
    def frechet(self) -> float:
        """Fréchet distance to the features of real images; lower is better."""
        return self["frechet"]

    def to_dict(self) -> dict[str, Any]:
        """Converts the score to JSON values; adds each share's value and 95 % interval."""
        return {name: _to_json(value) for name, value in self.values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Score":
        """Inverts `to_dict`. A metric that is missing, since the score is older, is None."""
        return cls(
            {
                name: Share(value["right"], value["count"]) if isinstance(value, dict) else value
                for name, value in values.items()
            }
        )


def _to_json(value: Value) -> Any:
    if not isinstance(value, Share):
        return value
    low, high = value.interval
    return {**dataclasses.asdict(value), "share": value.value, "low": low, "high": high}


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
    given = Given(
        images,
        prompts,
        features,
        real_features,
        held_out=np.array([p.held_out for p in prompts]),
        digit_right=digits == [p.digit for p in prompts],
        colours_right=(ink == [NAMES.index(p.ink) for p in prompts])
        & (paper == [NAMES.index(p.paper) for p in prompts]),
        style_right=classifier.styles(images) == STYLES.index(style) if style else None,
    )
    return Score({metric.name: metric.measure(given) for metric in METRICS})
