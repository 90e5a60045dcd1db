"""What belongs to a model folder: the parts that model_index.json names, what their loaders read, and documents.

Folders in use hold more: checkpoints of the same model in other formats, other variants, caches, what a training left.
None of it is taken into a new folder.
"""

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lcm_jax import json_file
from lcm_jax.errors import UserError, few
from lcm_jax.interop import model_index as model_index_json
from lcm_jax.interop import names, places, weights
from lcm_jax.interop.folder import Component, make_network
from lcm_jax.models import MODEL_CLASSES

_DOCUMENT = re.compile(r"(?:LICEN[CS]E|NOTICE|COPYING|AUTHORS|CITATION)(?:[._-].*)?|.*\.(?:md|txt)", re.IGNORECASE)
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, merges
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
_WITH_WEIGHTS = ("StableDiffusionSafetyChecker", "CLIPVisionModelWithProjection", *MODEL_CLASSES)


def parts(model_index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns part → class of all that model_index.json names; `where` is the file, for the message.

    Raises UserError for a part whose name is no plain name of a folder.
    """
    found = {
        name: value[1]
        for name, value in model_index.items()
        if model_index_json.is_part(value) and value[1] is not None
    }
    return {places.plain_name(name, f"{where} names"): part_class for name, part_class in found.items()}


def documents(file_names: Iterable[str]) -> list[str]:
    """Returns those of the file names that are read by people: model card, licence, notices, other texts."""
    return [name for name in file_names if _DOCUMENT.fullmatch(name)]


def of_copied_part(file_names: Iterable[str]) -> list[str]:
    """Returns those of the file names that are copied for a part that is not read: settings, documents, one model.

    Of the weights it takes one format, safetensors if there is one, and of that one variant, the plain one if there is
    one: what a loader finds first.
    """
    file_names = list(file_names)
    chosen = set(documents(file_names)) | set(_one_arrangement(file_names))
    chosen |= {name for name in file_names if name.endswith(_SETTINGS) and ".index." not in name}
    return sorted(chosen)


def _one_arrangement(file_names: Iterable[str]) -> list[str]:
    groups: dict[tuple[bool, str], list[re.Match]] = {}
    for found in filter(None, map(_WEIGHTS.fullmatch, file_names)):
        variant = found["variant"] or found["index_variant"] or ""
        groups.setdefault((found["format"] == "bin", variant), []).append(found)
    if not groups:
        return []
    group = groups[min(groups)]
    whole = [found for found in group if not found["shard"] and not found["index"]]
    return [found.string for found in whole or group]


def check_copied(directory: pathlib.Path, part_class: str, source: pathlib.Path) -> None:
    """Checks that a part that was copied has what its class needs to load, and that this can be read.

    Args: the copy; its class in model_index.json; where it came from, for the message.
    Raises: UserError says what is missing.
    """
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    if part_class in ("CLIPTokenizer", "CLIPTokenizerFast"):
        if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
            raise _lacks(source, "tokenizer.json, nor vocab.json and merges.txt")
    elif not any(name.endswith("config.json") for name in there):
        raise _lacks(source, "config.json")
    if part_class in _WITH_WEIGHTS and not any(weights.is_weights(name) for name in there):
        raise _lacks(source, "weights")
    for name in sorted(there):
        if name.endswith("config.json") or name in ("tokenizer.json", "vocab.json"):
            json_file.parse((directory / name).read_bytes(), str(source / name))
        if ".index." in name:
            shards = json_file.read(directory / name, {"weight_map": json_file.TEXTS}).get("weight_map", {}).values()
            if lost := sorted(set(shards) - there):
                raise UserError(f"{source / name} names {few(lost)}, missing there")
        if name.endswith(".safetensors"):
            try:
                weights.read_header(directory / name)
            except UserError as error:
                raise UserError(str(error).replace(str(directory), str(source))) from None


def check_written(component: Component, directory: pathlib.Path) -> None:
    """Checks that config.json and weights that were written fit each other, as reading them would.

    Only the headers of the weights are read. Raises UserError.
    """
    arrangement = component.source.arrangement if component.source else None
    file_names = arrangement.metadata if arrangement else [p.name for p in directory.glob("*.safetensors")]
    found: dict[str, tuple[int, ...]] = {}
    for name in file_names:
        found |= weights.read_shapes(directory / name)
    config = json_file.read(directory / "config.json")
    network = make_network(component.library_class, config, where=str(directory))
    wanted = {path: tuple(leaf.shape) for path, leaf in network.shapes.items()}
    names.match(component.library_class, found, wanted, str(directory))


def _lacks(source: pathlib.Path, what: str) -> UserError:
    other = f", or set {source.name} to [null, null] there" if source.name in model_index_json.COPIED else ""
    return UserError(f"{source} holds no {what}, but model_index.json names {source.name}: add it{other}")
