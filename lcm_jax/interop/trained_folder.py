"""Writes trained models as folders that diffusers loads.

The pipeline class is that of `Layout.students`. A distilled SD model with a w-embedding becomes a
`LatentConsistencyModelPipeline`. A model without one (w_embedding_dim 0) becomes a `StableDiffusionPipeline` with an
`LCMScheduler`, since LatentConsistencyModelPipeline always embeds the guidance scale. Run it with guidance_scale 1
(off), or slightly above 1 for classifier-free guidance. Both kinds of students of SDXL stay in its own pipeline.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcm_jax.errors import one_of
from lcm_jax.interop import card
from lcm_jax.interop.folder import Folder
from lcm_jax.interop.folder_writing import replace_params, write_json, write_parts
from lcm_jax.interop.recipe import RECIPE_FILE, Recipe
from lcm_jax.interop.replace import replacing
from lcm_jax.interop.weights import DTYPES


def lcm_scheduler(
    teacher: Folder, original_inference_steps: int = 50, timestep_scaling: float = 10.0
) -> dict[str, Any]:
    """Returns the scheduler_config.json of an `LCMScheduler` with the teacher's noise schedule and the trained grid.

    Keys missing from the teacher's file get the defaults of the teacher's scheduler class, which differ from
    LCMScheduler's. Clipping and thresholding are off: they apply to pixels, not latents.
    """
    return {
        "_class_name": "LCMScheduler",
        "_diffusers_version": teacher.scheduler.get(
            "_diffusers_version", teacher.model_index.get("_diffusers_version")
        ),
        **dataclasses.asdict(teacher.schedule),
        "trained_betas": None,
        "original_inference_steps": original_inference_steps,
        "timestep_scaling": timestep_scaling,
        "timestep_spacing": "leading",
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
    }


def write_lcm_folder(
    teacher: Folder,
    denoiser_params: Mapping[str, np.ndarray | Array],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes the teacher's folder with the distilled denoiser, an LCMScheduler, lcm_jax.json and a model card.

    Args:
      teacher: the teacher's folder. Its text encoder, VAE, tokenizer and any safety checker are reused.
      denoiser_params: path → array, the student's parameters.
      out: the new folder; an existing model folder is replaced.
      recipe: written to lcm_jax.json and the model card.
      dtype: dtype of the denoiser's weights: float32, float16 or bfloat16. Other parts keep their dtypes.

    Raises:
      UserError: the parameters don't fit the denoiser, or `out` can't be written.
    """
    one_of("dtype", dtype, DTYPES)
    layout = teacher.layout
    denoiser = teacher.components[layout.denoiser]
    config = {**denoiser.config, layout.w_embedding_key: recipe.w_embedding_dim or None}
    student = replace_params(denoiser, denoiser_params, jnp.dtype(dtype), config)
    model_index = {
        **teacher.model_index,
        "_class_name": layout.students[bool(recipe.w_embedding_dim)],
        "scheduler": ["diffusers", "LCMScheduler"],
    }
    for name in layout.copied:
        model_index.setdefault(name, [None, None])
    for name in layout.flagged:
        there, flag = model_index[name][1] is not None, f"requires_{name}"
        model_index[flag] = bool(there and teacher.model_index.get(flag, True))
    scheduler = lcm_scheduler(teacher, recipe.original_inference_steps, recipe.timestep_scaling)
    folder = Folder(teacher.path, model_index, scheduler, {**teacher.components, layout.denoiser: student})
    text = card.model_card(teacher.path, recipe, folder.pipeline_class)
    with replacing(out, teacher.path) as temporary:
        write_parts(_for_transformers(folder), temporary, recipe_holds=False)
        write_json(temporary / RECIPE_FILE, dataclasses.asdict(recipe))
        (temporary / card.CARD_FILE).write_text(text, encoding="utf-8")
    return pathlib.Path(out)


def write_trained_folder(
    source: Folder,
    params: Mapping[str, Mapping[str, np.ndarray | Array]],
    out: str | os.PathLike[str],
    *,
    config_updates: Mapping[str, Mapping[str, Any]] | None = None,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes the source folder with trained components; the pipeline class stays the same.

    Args:
      source: the folder that training started from.
      params: component → path → array, the trained parameters.
      out: the new folder; an existing model folder is replaced.
      config_updates: component → values to change in its config.json, e.g. {"vae": {"scaling_factor": 0.4}}.
      dtype: dtype of the trained components' weights.

    Raises:
      UserError: the parameters don't fit, or `out` can't be written.
    """
    one_of("dtype", dtype, DTYPES)
    updates = config_updates or {}
    components = dict(source.components)
    for name, update in updates.items():
        components[name] = dataclasses.replace(components[name], config={**components[name].config, **update})
    for name, flat in params.items():
        components[name] = replace_params(components[name], flat, jnp.dtype(dtype))
    folder = dataclasses.replace(source, components=components)
    with replacing(out, source.path) as temporary:
        write_parts(_for_transformers(folder), temporary, recipe_holds=source.layout.denoiser not in params)
    return pathlib.Path(out)


def with_lcm_scheduler(folder: Folder, recipe: Recipe | None) -> Folder:
    """Returns the folder with an LCMScheduler, after an LCM-LoRA was merged; unchanged if it already has one.

    Without a recipe, the grid is that of the LCM paper, N = 50, also LCMScheduler's default.
    """
    if folder.scheduler_class == "LCMScheduler":
        return folder
    index = {**folder.model_index, "scheduler": ["diffusers", "LCMScheduler"]}
    scheduler = lcm_scheduler(folder)
    if recipe:
        scheduler = lcm_scheduler(folder, recipe.original_inference_steps, recipe.timestep_scaling)
    return dataclasses.replace(folder, model_index=index, scheduler=scheduler)


def _for_transformers(folder: Folder) -> Folder:
    """Returns the folder with dtype float32 in each config.json that names a dtype.

    transformers loads in the dtype of config.json, diffusers in float32 by default. A half-precision text encoder with
    a float32 UNet would fail.
    """
    components = {}
    for name, component in folder.components.items():
        named = {key: "float32" for key in ("dtype", "torch_dtype") if key in component.config}
        components[name] = dataclasses.replace(component, config={**component.config, **named})
    return dataclasses.replace(folder, components=components)
