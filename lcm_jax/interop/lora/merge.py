"""Merges weighted LoRA files into the networks of a folder."""

import dataclasses
import numbers
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.errors import UserError, few
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.lora.file import find, read_header, read_lora
from lcm_jax.interop.recipe import MOST_STEPS, Recipe
from lcm_jax.models import Flat

Loras = Mapping[Any, float]  # file (str or path) -> weight


def merged_kernels(folder: Folder, loras: Loras) -> dict[str, Flat]:
    """Returns component → path → W + Σ weight · dW, in float32, for the kernels that change.

    A LoRA of weight 0 is read and checked but changes nothing. The folder's arrays are not modified.

    Raises:
      UserError: a weight or a merged kernel is not finite; a file is given twice; or as for `read_lora`.
    """
    check(loras)
    shapes = adaptable(folder)
    merged: dict[str, Flat] = {}
    for path, weight in loras.items():
        for name, adapter in read_lora(path, shapes).items():
            if weight == 0:
                continue
            changed, base = merged.setdefault(name, {}), folder.components[name].params
            kernels = {f"{module}.kernel" for module in adapter.alphas}
            so_far = {kernel: changed.get(kernel, base[kernel]) for kernel in kernels}
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                changed.update(lora.merge(so_far, adapter.params, adapter.alphas, weight))
    for name, changed in merged.items():
        for path, kernel in changed.items():
            changed[path] = np.asarray(kernel)
            if not np.isfinite(changed[path]).all():
                files = few(f"{file}:{weight:g}" for file, weight in loras.items())
                raise UserError(f"with {files} the weights of {name} are not finite in float32: {path}")
    return merged


def adaptable(folder: Folder) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns component → module → kernel shape, for the networks that a LoRA may adapt."""
    names = (folder.layout.denoiser, *folder.layout.tokenizers.values())
    return {
        name: lora.kernels(component.network().shapes) for name, component in folder.components.items() if name in names
    }


def check(loras: Loras) -> None:
    """Raises UserError if `loras` is not a mapping, a weight is not finite, or a file is missing or given twice."""
    if not isinstance(loras, Mapping):
        raise UserError(f"loras is {loras!r}; it must be a dict of file → weight")
    seen: dict[pathlib.Path, Any] = {}
    for path, weight in loras.items():
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"{path!r} in loras must be the path of a file")
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not abs(weight) <= sys.float_info.max:
            raise UserError(f"the weight of {path} is {weight!r}; it must be a finite number")
        file = find(path).resolve()
        if file in seen:
            raise UserError(f"{seen[file]} and {path} are the same LoRA; give one weight")
        seen[file] = path


def lcm_recipe(loras: Loras, num_train_timesteps: int = MOST_STEPS) -> Recipe | None:
    """Returns the recipe in the header of the first LCM-LoRA that has one, or None; LoRAs of weight 0 are ignored.

    `loras` is file → weight, `num_train_timesteps` the length of the model's noise schedule.

    Raises:
      UserError: two LoRAs were distilled for different timesteps, or one for more timesteps than the model has.
    """
    attached = [path for path, weight in loras.items() if weight != 0]
    recipes = {path: recipe for path in attached if (recipe := Recipe.of_header(read_header(path), str(path)))}
    for path, recipe in recipes.items():
        if recipe.original_inference_steps > num_train_timesteps:
            raise UserError(
                f"{path}: original_inference_steps is {recipe.original_inference_steps}, but this model has only "
                f"{num_train_timesteps} timesteps: it was distilled from another model"
            )
    grids = {(r.original_inference_steps, r.timestep_scaling): path for path, r in recipes.items()}
    if len(grids) > 1:
        raise UserError(
            f"{' and '.join(map(str, grids.values()))} were distilled for different timesteps: use only one of them"
        )
    return next(iter(recipes.values()), None)


def with_kernels(folder: Folder, kernels: Mapping[str, Flat]) -> Folder:
    """Returns the folder with kernels (component → path → array) replaced, cast to the dtypes of the folder's own.

    Raises:
      UserError: a kernel is not finite in that dtype.
    """
    changed = {}
    for name, of in kernels.items():
        own = folder.components[name].params
        with np.errstate(over="ignore"):
            rounded = {path: kernel.astype(own[path].dtype) for path, kernel in of.items()}
        if bad := [path for path, kernel in rounded.items() if not np.isfinite(kernel).all()]:
            raise UserError(f"with the LoRAs the weights of {name} are not finite in {own[bad[0]].dtype}: {bad[0]}")
        changed[name] = dataclasses.replace(folder.components[name], params={**own, **rounded})
    return dataclasses.replace(folder, components={**folder.components, **changed})
