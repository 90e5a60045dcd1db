"""Reads model_index.json: the parts of a pipeline and their classes."""

import json
import pathlib
from typing import Any

from lcm_jax.errors import UserError, nearest, plain
from lcm_jax.host import json_file
from lcm_jax.interop import places
from lcm_jax.interop.layouts import LAYOUTS, OPTIONAL, Layout

TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_EXAMPLES = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
    "safety_checker": ("stable_diffusion", "StableDiffusionSafetyChecker"),
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads model_index.json in the folder `path`.

    Returns:
      The JSON object, with [null, null] for optional parts that are null; and part → class for the other parts.

    Raises:
      UserError: the file can't be read; the pipeline, a part or a class isn't supported; a part is missing; a part's
        name is not a plain folder name.
    """
    where = path / "model_index.json"
    places.check_file(where, path)
    index = json_file.read(where, {"_class_name": json_file.TEXT}, largest=json_file.CONFIG)
    pipeline_class = index.get("_class_name")
    if pipeline_class not in LAYOUTS:
        refiner = index.get("text_encoder") == [None, None] and "text_encoder_2" in index
        hint = "; it looks like SDXL's refiner, which continues another model's samples" if refiner else ""
        raise UserError(
            f"{where}: _class_name is {plain(str(pipeline_class), 100)}; supported: {', '.join(LAYOUTS)}{hint}"
        )
    layout = LAYOUTS[pipeline_class]
    for name, kind in layout.settings.items():
        if name in index:
            kind.check(f"{where}: {name}", index[name])
    index.update({name: [None, None] for name in OPTIONAL if name in index and index[name] is None})
    classes = {}
    for name, value in index.items():
        if name in (*layout.required, *layout.copied) and not is_part(value):
            example = _example(name, layout)
            raise UserError(
                f"{where}: {name} is {plain(repr(value), 100)}; supported: a library and a class, like {example}"
            )
        if not name.startswith("_") and is_part(value):  # anything else is a setting of the pipeline
            places.plain_name(name, f"{where} names")
            if value[1] is not None:
                classes[name] = value[1]
    for name in layout.required:
        if name not in classes:
            raise UserError(f"{where} does not name a {name}{nearest(name, classes)}")
    for name, part_class in classes.items():
        if name not in (*layout.required, *layout.copied):
            raise UserError(f"{where} names {name}, a {part_class}, which {pipeline_class} does not have")
        supported = TOKENIZER_CLASSES if name in layout.tokenizers else (layout.networks.get(name, part_class),)
        if part_class not in supported:
            raise UserError(
                f"{where}: the class of {name} is {plain(part_class, 100)}; supported: {', '.join(supported)}"
            )
    return index, classes


def is_part(value: Any) -> bool:
    """Returns whether a value in model_index.json is a part: [library, class], or [null, null] for an absent part."""
    return isinstance(value, list) and len(value) == 2 and all(item is None or isinstance(item, str) for item in value)


def _example(name: str, layout: Layout) -> str:
    example = json.dumps(_EXAMPLES.get(name, ("diffusers", layout.networks.get(name))))
    return f"{example}, or [null, null] for none" if name in OPTIONAL else example
