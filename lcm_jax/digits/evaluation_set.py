"""Prompts, noise and real images for evaluating models of the captioned digits.

Everything is seeded, so all rows of a table have the same prompts and the same initial noise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from lcm_jax.digits.dataset import (
    ALL_PAIRS,
    HELD_OUT_PAIRS,
    PHRASES,
    PLACES,
    SEEN_PAIRS,
    SPLITS,
    caption,
    load_grids,
    render,
    split_images,
)

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


def real_images(prompts: Sequence[Prompt], split: str, style: str = "upright") -> UInt8[np.ndarray, "n 32 32 3"]:
    """Renders real digits of a split to match the prompts, at random places, cycling through each digit's images."""
    grids, digits = load_grids()
    places = np.random.default_rng([SEED, list(SPLITS).index(split)]).integers(PLACES, size=(len(prompts), 2))
    members = split_images(digits)[split]
    of_digit = [members[digits[members] == digit] for digit in range(10)]
    turn = [0] * 10
    images = []
    for prompt, (row, column) in zip(prompts, places.tolist(), strict=True):
        mine = of_digit[prompt.digit]
        grid = grids[mine[turn[prompt.digit] % len(mine)]]
        images.append(render(grid, prompt.ink, prompt.paper, (row, column), style))
        turn[prompt.digit] += 1
    return np.stack(images)


def first_noise(count: int, shape: Sequence[int], seed: int) -> Float[np.ndarray, "n h w c"]:
    """Returns standard normal float32 noise; image i gets the same noise for every `count`."""
    return np.random.default_rng(seed).standard_normal((count, *shape), np.float32)


def later_noise(steps: int, count: int, shape: Sequence[int], seed: int) -> Float[np.ndarray, "s n h w c"]:
    """Returns the noise that a consistency model adds between steps, float32 (steps - 1, count, …)."""
    return np.random.default_rng(seed).standard_normal((steps - 1, count, *shape), np.float32)
