"""Writing what was trained as a folder that diffusers loads.

A distilled UNet with a w-embedding becomes a `LatentConsistencyModelPipeline`. One without (w_embedding_dim 0) becomes
a `StableDiffusionPipeline` with an `LCMScheduler`: LatentConsistencyModelPipeline always embeds the guidance and can't
run it, StableDiffusionPipeline does, with guidance_scale 1 (off) or real guidance a little above.
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

_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


def lcm_scheduler(
    teacher: Folder, original_inference_steps: int = 50, timestep_scaling: float = 10.0
) -> dict[str, Any]:
    """Returns scheduler_config.json of an `LCMScheduler`: the teacher's noise schedule, the trained grid.

    What the teacher's file leaves out is written with the default of its class, which isn't LCMScheduler's. Clipping
    and thresholding are for pictures, not for latents: they are off.
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
    unet_params: Mapping[str, np.ndarray | Array],
    out: str | os.PathLike[str],
    *,
    recipe: Recipe,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes the teacher's folder with the distilled UNet, an LCMScheduler, lcm_jax.json and a model card.

    Args:
      teacher: the folder that was distilled; text encoder, VAE, tokenizer (and safety checker) are taken over.
      unet_params: path → array of the student.
      out: the new folder; an existing model folder is replaced.
      recipe: what goes into lcm_jax.json and the model card.
      dtype: of the UNet's weights: float32, float16 or bfloat16. The others keep the teacher's.

    Raises:
      UserError: the parameters don't fit the UNet; `out` can't be written.
    """
    one_of("dtype", dtype, DTYPES)
    unet = teacher.components["unet"]
    config = {**unet.config, "time_cond_proj_dim": recipe.w_embedding_dim or None}
    student = replace_params(unet, unet_params, jnp.dtype(dtype), config)
    model_index = {
        **teacher.model_index,
        "_class_name": "LatentConsistencyModelPipeline" if recipe.w_embedding_dim else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "LCMScheduler"],
    }
    for name in _OPTIONAL:
        model_index.setdefault(name, [None, None])
    has_checker = model_index["safety_checker"][1] is not None
    model_index["requires_safety_checker"] = bool(
        has_checker and teacher.model_index.get("requires_safety_checker", True)
    )
    scheduler = lcm_scheduler(teacher, recipe.original_inference_steps, recipe.timestep_scaling)
    folder = Folder(teacher.path, model_index, scheduler, {**teacher.components, "unet": student})
    text = card.lcm_card(teacher.path, recipe)
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
    """Writes the source's folder, of the same pipeline class, with some of its components trained.

    Args:
      source: the folder that training started from.
      params: component → path → array.
      out: the new folder; an existing model folder is replaced.
      config_updates: component → values to change in its config.json, e.g. {"vae": {"scaling_factor": 0.4}}.
      dtype: of the trained components' weights.

    Raises:
      UserError: the parameters don't fit; `out` can't be written.
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
        write_parts(_for_transformers(folder), temporary, recipe_holds="unet" not in params)
    return pathlib.Path(out)


def with_lcm_scheduler(folder: Folder, recipe: Recipe | None) -> Folder:
    """Returns the folder with an LCMScheduler, for a model that an LCM-LoRA was merged into; its own if it has one.

    Where the LoRA doesn't tell its recipe, the grid is the LCM paper's, N = 50, which LCMScheduler has by default.
    """
    if folder.scheduler_class == "LCMScheduler":
        return folder
    index = {**folder.model_index, "scheduler": ["diffusers", "LCMScheduler"]}
    scheduler = lcm_scheduler(folder)
    if recipe:
        scheduler = lcm_scheduler(folder, recipe.original_inference_steps, recipe.timestep_scaling)
    return dataclasses.replace(folder, model_index=index, scheduler=scheduler)


def _for_transformers(folder: Folder) -> Folder:
    """Returns the folder with the dtype float32 in every config.json that names one.

    transformers loads in the dtype that config.json names, diffusers in float32 unless another is requested: a half
    precision text encoder beside a float32 UNet would fail there.
    """
    components = {}
    for name, component in folder.components.items():
        named = {key: "float32" for key in ("dtype", "torch_dtype") if key in component.config}
        components[name] = dataclasses.replace(component, config={**component.config, **named})
    return dataclasses.replace(folder, components=components)
