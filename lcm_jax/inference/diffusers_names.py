"""Names of diffusers' pipelines, answered with the name here."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from lcm_jax.errors import nearest

ARGUMENTS = {  # argument of diffusers' pipelines → ours
    "prompt": "prompts",
    "torch_dtype": "dtype",
    "cross_attention_kwargs": "pipe.set_loras({file: weight})",
    "num_inference_steps": "steps",
    "generator": "seed=0, a whole number",
    "output_type": "output",
    "num_images_per_prompt": "images_per_prompt",
    "num_images": "images_per_prompt",
    "crops_coords_top_left": "crop",
    "negative_crops_coords_top_left": "negative_crop",
}
METHODS = {  # methods of diffusers' pipelines → ours
    "to": "JAX_PLATFORMS=cuda, tpu or cpu, before the process starts",
    "load_lora_weights": "set_loras({file: weight})",
    "unload_lora_weights": "set_loras({})",
    "save_pretrained": "save(folder)",
    "enable_vae_tiling": "pipe(…, decode_in_strips=True)",
}


def refuse(others: Iterable[str], of: Callable[..., Any]) -> None:
    """Raises TypeError for arguments that `of` does not have, with the name that they have here."""
    for name in others:
        ours = ARGUMENTS.get(name, "")
        hint = f"; use {ours}" if ours else nearest(name, inspect.signature(of).parameters)
        raise TypeError(f"there is no argument {name}{hint}")


def method(name: str) -> str:
    """Returns what a missing attribute is here, as the end of a message, or ""."""
    return f"; use {METHODS[name]}" if name in METHODS else ""
