"""model_index.json: which parts a pipeline has, and of which class each is."""

import pathlib
from typing import Any

from lcm_jax import json_file
from lcm_jax.errors import UserError, nearest, plain
from lcm_jax.interop import places

PIPELINE_CLASSES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
NETWORK_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
# Neither run nor changed, so of any class: transformers renames that of the feature extractor with its versions.
COPIED = ("safety_checker", "feature_extractor", "image_encoder")
_SUPPORTED = {**{name: (known,) for name, known in NETWORK_CLASSES.items()}, "tokenizer": TOKENIZER_CLASSES}
_REQUIRED = (*NETWORK_CLASSES, "tokenizer", "scheduler")


def read(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads model_index.json in the folder `path`.

    Returns: the JSON object; part → class, for each part that is not null.
    Raises: UserError for a file that can't be read, a pipeline, a part or a class that isn't supported, a part that is
      missing, and a part whose name is no plain name of a folder.
    """
    where = path / "model_index.json"
    places.check_file(where, path)
    index = json_file.read(where, {"_class_name": json_file.TEXT}, largest=json_file.CONFIG)
    pipeline_class = index.get("_class_name")
    if pipeline_class not in PIPELINE_CLASSES:
        raise UserError(
            f"{where}: _class_name is {plain(str(pipeline_class), 100)}; supported: {', '.join(PIPELINE_CLASSES)}"
        )
    classes = {}
    for name, value in index.items():
        if name.startswith("_") or not (isinstance(value, (list, dict)) or name in (*_REQUIRED, *COPIED)):
            continue  # a setting of the pipeline
        part_class = _part_class(name, value, where)
        if part_class is not None:
            classes[name] = part_class
    for name in _REQUIRED:
        if name not in classes:
            raise UserError(f"{where} names no {name}{nearest(name, classes)}")
    for name, part_class in classes.items():
        if name not in (*_REQUIRED, *COPIED):
            raise UserError(f"{where} names {name}, of the class {part_class}, which no {pipeline_class} has")
        if name in _SUPPORTED and part_class not in _SUPPORTED[name]:
            raise UserError(
                f"{where}: the class of {name} is {plain(part_class, 100)}; supported: {', '.join(_SUPPORTED[name])}"
            )
    return index, classes


def _part_class(name: str, value: Any, where: pathlib.Path) -> str | None:
    places.plain_name(name, f"{where} names")
    pair = isinstance(value, list) and len(value) == 2
    if not pair or not all(item is None or isinstance(item, str) for item in value):
        found = plain(repr(value), 100)
        raise UserError(f"{where}: {name} is {found}; supported: a library and a class, like {_example(name)}")
    return value[1]


def _example(name: str) -> str:
    return repr(["diffusers", NETWORK_CLASSES.get(name, "DDIMScheduler")])
