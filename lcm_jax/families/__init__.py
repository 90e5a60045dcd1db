"""Kinds of teachers: what is specific to each stands in one record here."""

from lcm_jax.errors import UserError
from lcm_jax.families.base import Condition, Family
from lcm_jax.families.sd import SD
from lcm_jax.interop.layouts import LAYOUTS

FAMILIES = (SD,)


def family_of(pipeline_class: str) -> Family:
    """Returns the family of the folders of a diffusers pipeline class; raises UserError for an unsupported one."""
    for family in FAMILIES:
        if family.layout is LAYOUTS.get(pipeline_class):
            return family
    raise UserError(f"_class_name is {pipeline_class!r}; supported: {', '.join(LAYOUTS)}")


__all__ = ["FAMILIES", "SD", "Condition", "Family", "family_of"]
