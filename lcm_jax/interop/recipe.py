"""How a consistency model was distilled, as its folder (lcm_jax.json) or its LoRA file (in the header) tells."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from lcm_jax import json_file
from lcm_jax.errors import UserError

RECIPE_FILE = "lcm_jax.json"
HEADER_KEY = "lcm_jax"
MOST_STEPS = 1000  # no noise schedule that is read here has more timesteps


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a consistency model was distilled: the content of lcm_jax.json, or of an LCM-LoRA's header.

    Attributes:
      teacher: the hub id that it was distilled from, or the folder's name.
      weights: "ema" or "student".
      guidance_min, guidance_max: the trained range of guidance_scale (w + 1).
      solver: psi, "ddim", "dpm" or "dpmpp".
      skip: k, the training timesteps that one step of psi crosses.
      original_inference_steps: N, the number of timesteps on the trained grid.
      timestep_scaling: of the boundary condition.
      w_embedding_dim: 0 for a student that isn't told the guidance.
      distance: the loss's d.
      steps, batch_size, learning_rate, ema_decay: of the training; ema_decay 0 is none.
    """

    teacher: str
    weights: str
    guidance_min: float
    guidance_max: float
    solver: str
    skip: int
    original_inference_steps: int
    timestep_scaling: float
    w_embedding_dim: int
    distance: str
    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Recipe | None":
        """Returns the recipe in a model folder, None if it has none; raises UserError if it can't be read."""
        path = folder / RECIPE_FILE
        return cls._of(json_file.read(path), str(path)) if path.exists() else None

    @classmethod
    def of_header(cls, header: Mapping[str, str], where: str) -> "Recipe | None":
        """Returns the recipe in a LoRA file's header, as `read` does; `where` is the file."""
        if HEADER_KEY not in header:
            return None
        where = f"{where}: {HEADER_KEY} in its header"
        return cls._of(json_file.parse(header[HEADER_KEY], where), where)

    def to_header(self) -> dict[str, str]:
        """Returns what a LoRA file's header holds of it."""
        return {HEADER_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True)}

    @classmethod
    def _of(cls, values: Mapping[str, Any], where: str) -> "Recipe":
        names = {field.name for field in dataclasses.fields(cls)}
        if absent := sorted(names - values.keys()):
            raise UserError(f"{where} has no {absent[0]}")
        for field in dataclasses.fields(cls):
            value, kinds = values[field.name], _KINDS[field.type]  # pyright: ignore[reportArgumentType]
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise UserError(f"{where}: {field.name} is {value!r}, no {kinds[-1].__name__}")
        if not 1 <= (steps := values["original_inference_steps"]) <= MOST_STEPS:
            raise UserError(f"{where}: original_inference_steps is {steps}; it must be in 1 … {MOST_STEPS}")
        if not 0 < (scaling := values["timestep_scaling"]) < float("inf"):
            raise UserError(f"{where}: timestep_scaling is {scaling}; it must be positive")
        return cls(**{name: values[name] for name in names})


_KINDS: dict[type, tuple[type, ...]] = {str: (str,), int: (int,), float: (int, float)}
