"""Evaluation rows as a Markdown table, as JSON, and as curves over the number of steps."""

import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax.digits.measures import METRICS, Metric, Score
from lcm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
      name: "teacher, DDIM", "student", "real test images", …
      score: score of its images.
      steps, guidance_scale, images_per_second: None for real images.
    """

    name: str
    score: Score
    steps: int | None = None
    guidance_scale: float | None = None
    images_per_second: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Converts the row to JSON values."""
        return {**vars(self), "score": self.score.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """Inverts `to_dict`."""
        return cls(**{**values, "score": Score.from_dict(values["score"])})


def columns(rows: Sequence[Row]) -> dict[str, Callable[[Row], str]]:
    """Returns caption → function that formats a row's cell, for each column of the table of these rows.

    A value that a row does not have is an empty cell.
    """
    usual = {caption: cell for metric in METRICS if not metric.optional for caption, cell in _cells(metric)}
    optional = {
        caption: cell
        for metric in METRICS
        if metric.optional and rows[0].score[metric.name] is not None
        for caption, cell in _cells(metric)
    }
    return {
        "": lambda row: row.name,
        "steps": lambda row: "" if row.steps is None else str(row.steps),
        "guidance": lambda row: "" if row.guidance_scale is None else f"{row.guidance_scale:g}",
        **usual,
        "images/s": lambda row: "" if row.images_per_second is None else f"{row.images_per_second:.0f}",
        **optional,
    }


def _cells(metric: Metric) -> Iterator[tuple[str, Callable[[Row], str]]]:
    for caption, form in metric.columns.items():

        def cell(row: Row, form: Callable[[Any], str] = form) -> str:
            value = row.score[metric.name]
            return "" if value is None else form(value)

        yield caption, cell


def said(row: Row) -> str:
    """Returns a one-line summary of the row, for progress output."""
    accuracy, steps = 100 * row.score.prompt.value, f"{row.steps} step{'s' * (row.steps != 1)}"
    return f"{row.name}, {steps}: guidance {row.guidance_scale:g}, {accuracy:.1f} %, {row.score.frechet:.1f}"


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table with aligned columns."""
    cells = columns(rows)
    lines = [list(cells), *([cell(row) for cell in cells.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "| "
        + " | ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([texts[0], rule, *texts[1:]])


def figure_class() -> Any:
    """Returns matplotlib's Figure class; raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the curves need matplotlib: pip install 'lcm_jax[demo]'") from None
    return Figure


def curves(rows: Sequence[Row]) -> np.ndarray:
    """Plots prompt accuracy and Fréchet distance over the number of network steps; returns uint8 (H, W, 3).

    Raises UserError without matplotlib.
    """
    figure = figure_class()(figsize=(9, 3.4), dpi=110, layout="constrained")
    accuracy, frechet = figure.subplots(1, 2)
    for name in dict.fromkeys(row.name for row in rows if row.steps):
        mine = sorted((row for row in rows if row.name == name), key=lambda row: row.steps or 0)
        steps = [row.steps for row in mine]
        share = np.array([100 * row.score.prompt.value for row in mine])
        ends = np.array([[100 * end for end in row.score.prompt.interval] for row in mine])
        width = 2.0 if name.startswith("student") else 1.2
        accuracy.errorbar(steps, share, yerr=np.abs(ends.T - share), marker="o", capsize=3, lw=width, label=name)
        frechet.plot(steps, [row.score.frechet for row in mine], marker="o", lw=width, label=name)
    for row in rows:
        if not row.steps:
            accuracy.axhline(100 * row.score.prompt.value, color="0.6", lw=0.8, ls="--" if "VAE" in row.name else ":")
            frechet.axhline(
                row.score.frechet, color="0.6", lw=0.8, ls="--" if "VAE" in row.name else ":", label=row.name
            )
    accuracy.set_ylabel("digit and colours right, %")
    frechet.set_ylabel("Fréchet distance to real images")
    frechet.set_yscale("log")
    frechet.legend(fontsize=7)
    for axes in (accuracy, frechet):
        axes.set_xscale("log", base=2)
        ticks = sorted({row.steps for row in rows if row.steps})
        axes.set_xticks(ticks, [str(step) for step in ticks])
        axes.set_xlabel("network steps")
        axes.grid(alpha=0.3)
    return pixels(figure)


def pixels(figure: Any) -> np.ndarray:
    """Renders a matplotlib figure to uint8 (H, W, 3)."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as image:
        return np.array(image.convert("RGB"))
