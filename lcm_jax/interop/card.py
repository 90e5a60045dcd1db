"""Model card (README.md) of an exported folder: front matter for the Hugging Face Hub, usage and recipe."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Any

from lcm_jax.errors import UserError

if TYPE_CHECKING:
    from lcm_jax.interop.recipe import Recipe

CARD_FILE = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")


def teacher_licence(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the license keys in the front matter of a folder's model card, {} without a card or a license.

    Raises UserError if the front matter can't be read.
    """
    from huggingface_hub import metadata_load  # lazy: slow to import

    path = folder / CARD_FILE
    if not path.is_file():
        return {}
    try:
        front = metadata_load(path) or {}
    except Exception as error:  # YAML errors aren't ValueErrors
        raise UserError(
            f"{path}: its front matter, which may name a licence, can't be read: {str(error).splitlines()[0]}"
        ) from None
    return {key: front[key] for key in _LICENCE_KEYS if key in front}


def model_card(teacher: pathlib.Path, recipe: Recipe, pipeline: str) -> str:
    """Returns the text of the model card of a distilled model, a folder of the diffusers class `pipeline`.

    The teacher's license also covers the distilled model. If the teacher's card names none, the text says so.
    """
    from huggingface_hub import ModelCardData

    licence = teacher_licence(teacher)
    front = ModelCardData(
        **licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["few-step", "text-to-image", "lcm_jax"],
    )
    if licence:
        terms = f"The teacher's licence, `{licence.get('license', 'see above')}`, also applies to this model."
    else:
        terms = "The teacher's folder names no licence; look up its terms before you distribute this model."
    middle = (recipe.guidance_min + recipe.guidance_max) / 2
    if recipe.w_embedding_dim:
        scale = middle
        guidance = (
            f"The model takes the guidance as an input: `guidance_scale` from {recipe.guidance_min:g} to "
            f"{recipe.guidance_max:g}, at no extra cost. A negative prompt has no effect."
        )
    else:
        scale = 1.0
        guidance = (
            f"The model has learnt the mean over `guidance_scale` {recipe.guidance_min:g} to {recipe.guidance_max:g}, "
            "which is not an input: use 1 (off); slightly higher values add real guidance at twice the cost."
        )
    rows = {
        "teacher": f"`{recipe.teacher}`",
        "weights": "exponential moving average" if recipe.weights == "ema" else "student",
        "timesteps of the trained grid": recipe.original_inference_steps,
        "guidance_scale trained": f"{recipe.guidance_min:g} to {recipe.guidance_max:g}",
        "EMA decay": f"{recipe.ema_decay:g}" if recipe.ema_decay else "none",
        "steps × batch": f"{recipe.steps} × {recipe.batch_size}",
        "learning rate": f"{recipe.learning_rate:g}",
        **recipe.options,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{front.to_yaml()}
---

# A few-step model distilled from `{recipe.teacher}`

Samples images in 1 to 8 network steps. Distilled with lcm_jax by {recipe.method}.

{terms}

## Use

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("<this folder>")
image = pipe("<prompt>", num_inference_steps=4, guidance_scale={scale:g}).images[0]
```

```python
import lcm_jax

pipe = lcm_jax.load_pipeline("<this folder>")
images = pipe(["<prompt>"], steps=4, guidance_scale={scale:g}, seed=0)
```

{guidance}

## Recipe

| | |
|---|---|
{table}
"""
