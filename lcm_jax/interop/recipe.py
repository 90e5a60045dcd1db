"""Distillation settings of a few-step model, stored in lcm_jax.json or in the header of an LCM-LoRA file."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lcm_jax.errors import UserError
from lcm_jax.host import json_file
from lcm_jax.host.json_file import INTEGER, NUMBER, POSITIVE, TEXT, WHOLE, Kind

RECIPE_FILE = "lcm_jax.json"
HEADER_KEY = "lcm_jax"
MOST_STEPS = 1000  # the most timesteps of any supported noise schedule
# older files are all from latent consistency distillation; they lack the method, and its options are top-level keys
_OLD_METHOD = "latent consistency distillation ([arXiv:2310.04378](https://arxiv.org/abs/2310.04378))"
_OLD_OPTIONS = ("solver", "skip", "distance")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Distillation settings of a few-step model: the content of lcm_jax.json or of an LCM-LoRA's header.

    Attributes:
      teacher: hub id or folder name of the teacher.
      method: how it was distilled, as the model card says it after "by"; Markdown.
      weights: "ema" or "student".
      guidance_min, guidance_max: trained range of guidance_scale (w + 1).
      original_inference_steps: N, the number of timesteps in the trained grid.
      timestep_scaling: timestep scale in the boundary condition.
      w_embedding_dim: size of the guidance embedding; 0 for a student without one.
      steps, batch_size, learning_rate, ema_decay: training settings; ema_decay 0 means no EMA.
      options: name → text, number or bool, those of the objective. Only the model card reads them.
    """

    teacher: str
    method: str
    weights: str
    guidance_min: float
    guidance_max: float
    original_inference_steps: int
    timestep_scaling: float
    w_embedding_dim: int
    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    options: Mapping[str, str | float]

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Recipe | None":
        """Returns the recipe of a model folder, or None if it has none; raises UserError if it can't be read."""
        path = folder / RECIPE_FILE
        return cls._of(json_file.read(path, _KINDS), str(path)) if path.exists() else None

    @classmethod
    def of_header(cls, header: Mapping[str, str], where: str) -> "Recipe | None":
        """Returns the recipe in a LoRA file's header, as `read` does; `where` names the file in errors."""
        if HEADER_KEY not in header:
            return None
        where = f"{where}: {HEADER_KEY} in its header"
        return cls._of(json_file.parse(header[HEADER_KEY], where, _KINDS), where)

    def to_header(self) -> dict[str, str]:
        """Returns the recipe as a LoRA file's header entry."""
        return {HEADER_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def _of(cls, values: Mapping[str, Any], where: str) -> "Recipe":
        if "options" not in values:
            options = {name: values[name] for name in _OLD_OPTIONS if name in values}
            values = {"method": _OLD_METHOD, **values, "options": options}
        names = [field.name for field in dataclasses.fields(cls)]
        if absent := sorted(set(names) - values.keys()):
            raise UserError(f"{where} has no {absent[0]}")
        if values["guidance_min"] > values["guidance_max"]:
            raise UserError(
                f"{where}: guidance_max is {values['guidance_max']}; it can't be below guidance_min "
                f"{values['guidance_min']}"
            )
        return cls(**{name: values[name] for name in names})


def _one_of(choices: Collection[str]) -> Kind:
    return Kind(", ".join(map(repr, choices)), lambda value: isinstance(value, str) and value in choices)


def _number(name: str, test: Callable[[float], bool]) -> Kind:
    return Kind(name, lambda value: NUMBER.test(value) and test(value))


def _is_options(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str | int | float) for each in value.values())


def _whole(low: int, high: int) -> Kind:
    return Kind(f"a whole number in {low} … {high}", lambda value: INTEGER.test(value) and low <= value <= high)


_KINDS = {
    "teacher": TEXT,
    "method": TEXT,
    "weights": _one_of(("ema", "student")),
    "guidance_min": _number("a number, at least 1", lambda value: value >= 1),
    "guidance_max": _number("a number, at least 1", lambda value: value >= 1),
    "original_inference_steps": _whole(1, MOST_STEPS),
    "timestep_scaling": POSITIVE,
    "w_embedding_dim": _whole(0, 2**31 - 1),
    "steps": _whole(0, 2**31 - 1),
    "batch_size": WHOLE,
    "learning_rate": _number("a number, at least 0", lambda value: value >= 0),
    "ema_decay": _number("a number in [0, 1)", lambda value: 0 <= value < 1),
    "options": Kind("an object of texts, numbers and booleans", _is_options),
}
