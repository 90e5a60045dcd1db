"""Kinds of teachers: what is specific to each stands in one record here."""

from collections.abc import Mapping
from typing import Any

from lcm_jax.errors import UserError
from lcm_jax.families.base import Condition, Family
from lcm_jax.families.sd import SD
from lcm_jax.families.sdxl import SDXL
from lcm_jax.interop.layouts import LAYOUTS

FAMILIES = (SD, SDXL)


def family_of(model_index: Mapping[str, Any]) -> Family:
    """Returns the family of the folder with this model_index.json; raises UserError for an unsupported pipeline."""
    pipeline_class = model_index["_class_name"]
    for family in FAMILIES:
        if family.layout is LAYOUTS.get(pipeline_class):
            return family.of_folder(model_index)
    raise UserError(f"_class_name is {pipeline_class!r}; supported: {', '.join(LAYOUTS)}")


__all__ = ["FAMILIES", "SD", "SDXL", "Condition", "Family", "family_of"]
