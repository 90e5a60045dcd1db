"""Evaluation rows as a Markdown table, as JSON, and as curves over the number of steps."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from lcm_jax.digits.measures import Score, Share
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
        """Converts the row to JSON values; adds each share's value and 95 % interval."""
        values = dataclasses.asdict(self)
        for name, value in list(values["score"].items()):
            if isinstance(share := getattr(self.score, name), Share):
                low, high = share.interval
                values["score"][name] = {**value, "share": share.value, "low": low, "high": high}
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Row":
        """Inverts `to_dict`."""
        score: dict[str, Any] = {
            name: Share(value["right"], value["count"]) if isinstance(value, dict) else value
            for name, value in values["score"].items()
        }
        return cls(**{**values, "score": Score(**score)})


HEADER = (
    *("", "steps", "guidance", "prompt right", "95 % interval", "seen", "held out"),
    *("Fréchet", "variety", "images/s"),
)


def cells(row: Row) -> list[str]:
    """Returns the row's cells in the order of HEADER, then the style if the row has one."""
    score = row.score
    low, high = score.prompt.interval
    return [
        row.name,
        "" if row.steps is None else str(row.steps),
        "" if row.guidance_scale is None else f"{row.guidance_scale:g}",
        _percent(score.prompt),
        f"{100 * low:.1f} to {100 * high:.1f}",
        _percent(score.seen),
        _percent(score.held_out),
        f"{score.frechet:.1f}",
        "" if score.variety is None else f"{score.variety:.2f}",
        "" if row.images_per_second is None else f"{row.images_per_second:.0f}",
        *([] if score.style is None else [_percent(score.style)]),
    ]


def said(row: Row) -> str:
    """Returns a one-line summary of the row, for progress output."""
    accuracy, steps = 100 * row.score.prompt.value, f"{row.steps} step{'s' * (row.steps != 1)}"
    return f"{row.name}, {steps}: guidance {row.guidance_scale:g}, {accuracy:.1f} %, {row.score.frechet:.1f}"


def _percent(share: Share | None) -> str:
    return "" if share is None else f"{100 * share.value:.1f} %"


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table with aligned columns."""
    style = ("style right",) if rows[0].score.style else ()
    lines = [[*HEADER, *style], *(cells(row) for row in rows)]
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
