"""Evaluates an LCM-LoRA on a digits model: against the model itself, per number of steps and per LoRA weight."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import UInt8

from lcm_jax.digits.classifier import Classifier
from lcm_jax.digits.dataset import STYLES
from lcm_jax.digits.evaluation_set import Prompt, real_images, test_prompts
from lcm_jax.digits.guidance import best_guidance, work
from lcm_jax.digits.measures import score
from lcm_jax.digits.report import Row, figure_class, pixels, said
from lcm_jax.digits.sampling import sample_all
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.interop.lora.merge import Loras
from lcm_jax.monitor.progress import Sampling

WITHOUT, WITH = "the model, DDIM", "LCM-LoRA"
BASE_STEPS = (4, 50)
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
# Candidates. The base ones suit few and many steps; an LCM-LoRA needs less, since guidance is distilled into it.
BASE_GUIDANCE, LORA_GUIDANCE = (1.5, 3.0), (1.0, 1.5, 2.0)


class Measured:
    """Samples and scores a diffusion model of the digits with and without an LCM-LoRA.

    Attributes:
      pipe: the model.
      style: the style of its images, one of STYLES. Any but the first is scored too, which needs a classifier trained
        with styles.
    """

    def __init__(
        self, pipe: Pipeline, lcm: tuple[str, float], others: Loras, classifier: Classifier, style: str
    ) -> None:
        """Takes the LCM-LoRA's file and weight as `lcm`, and the LoRAs that belong to the model as `others`."""
        self.pipe, self.style = pipe, style
        self._lcm, self._others, self._classifier = lcm, dict(others), classifier
        self._asked = None if style == STYLES[0] else style
        self._prompts = test_prompts()
        self._features, _ = classifier(real_images(self._prompts, "test", style))
        self._progress: Sampling | None = None

    @contextlib.contextmanager
    def progress(self, steps: Sequence[int], weights: Sequence[float]) -> Iterator[None]:
        """Shows the progress of all rows while the context lasts: those for these steps, and over these weights."""
        count = len(self._prompts)
        shown = min(steps, key=lambda n: abs(n - 4))
        total = work(BASE_STEPS, BASE_GUIDANCE, count) + work(steps, LORA_GUIDANCE, count)
        with Sampling(total + shown * len(weights) * count) as self._progress:
            yield
        self._progress = None

    def without(self) -> list[Row]:
        """Returns rows for the model without the LCM-LoRA, with DDIM in BASE_STEPS steps at the best guidance."""
        self.pipe.set_loras(self._others)
        return [self._row(WITHOUT, n, BASE_GUIDANCE, "ddim") for n in BASE_STEPS]

    def with_lora(self, steps: Sequence[int]) -> list[Row]:
        """Returns one row per number of steps, with the LCM-LoRA at its given weight and the best guidance."""
        self._attach(self._lcm[1])
        return [self._row(WITH, n, LORA_GUIDANCE, "lcm") for n in steps]

    def over_weights(self, row: Row, weights: Sequence[float] = WEIGHTS) -> list[Row]:
        """Returns one row per LCM-LoRA weight, with the steps and guidance of `row`."""
        rows = []
        for weight in weights:
            self._attach(weight)
            rows.append(self._row(f"{WITH} × {weight:g}", row.steps or 1, [row.guidance_scale or 1.0], "lcm"))
        return rows

    def sheet(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> dict[str, UInt8[np.ndarray, "n 32 32 3"]]:
        """Returns row name -> images for the prompts, sampled with each row's settings; real test images come first."""
        sampled = {"real test images": real_images(prompts, "test", self.style)}
        for row in rows:
            lora = row.name == WITH
            self._attach(self._lcm[1] if lora else 0.0)
            name = f"{row.name}, {row.steps} step{'s' * (row.steps != 1)}"
            sampler = "lcm" if lora else "ddim"
            sampled[name], _ = sample_all(self.pipe, prompts, row.steps or 1, row.guidance_scale, sampler, fill=True)
        return sampled

    def _attach(self, weight: float) -> None:
        self.pipe.set_loras({**self._others, self._lcm[0]: weight})

    def _row(self, name: str, steps: int, candidates: Sequence[float], sampler: str) -> Row:
        guidance = best_guidance(self.pipe, self._classifier, steps, candidates, sampler, self.style, self._progress)
        done = self._progress and self._progress.series(f"{name}, {steps} steps", len(self._prompts), steps)
        images, rate = sample_all(self.pipe, self._prompts, steps, guidance, sampler, done=done)
        measured = score(images, self._prompts, self._classifier, self._features, self._asked)
        row = Row(name, measured, steps, guidance, rate)
        print(said(row), flush=True)
        return row


def weight_curves(rows: Sequence[Row], weights: Sequence[float], base: Row) -> np.ndarray:
    """Plots prompt accuracy, style accuracy and Fréchet distance over the LoRA weight; returns uint8 (H, W, 3).

    Args:
      rows: rows from `Measured.over_weights`.
      base: row of the model without the LCM-LoRA, for comparison.
    """
    figure = figure_class()(figsize=(9, 3.4), dpi=110, layout="constrained")
    share, frechet = figure.subplots(1, 2)
    share.plot(weights, [100 * row.score.prompt.value for row in rows], marker="o", label="digit and colours right")
    share.axhline(100 * base.score.prompt.value, color="0.6", ls=":", label=f"{base.name}, {base.steps} steps")
    if rows[0].score["style"]:
        styles = [100 * row.score["style"].value for row in rows if row.score["style"]]
        share.plot(weights, styles, marker="s", label="style right")
    frechet.plot(weights, [row.score.frechet for row in rows], marker="o")
    frechet.axhline(base.score.frechet, color="0.6", ls=":")
    share.set_ylabel("%")
    share.legend(fontsize=7)
    frechet.set_ylabel("Fréchet distance to real images")
    frechet.set_ylim(bottom=0)
    for axes in (share, frechet):
        axes.set_xlabel(f"weight of the LCM-LoRA, {rows[0].steps} steps")
        axes.grid(alpha=0.3)
    return pixels(figure)
