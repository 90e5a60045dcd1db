"""Selects the files of a model folder to copy: parts named by model_index.json, files that loaders read, documents.

Other files are not copied: checkpoints in other formats, other variants, caches, training leftovers.
"""

import contextlib
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from lcm_jax.errors import UserError, few
from lcm_jax.host import json_file
from lcm_jax.interop import model_index as model_index_json
from lcm_jax.interop import places, weights
from lcm_jax.interop.layouts import OPTIONAL
from lcm_jax.interop.network_configs import MODEL_CLASSES

_DOCUMENT = re.compile(  # vocab.txt and merges.txt are parts of a tokenizer
    r"(?:LICEN[CS]E|NOTICE|COPYING|AUTHORS|CITATION)(?:[._-].*)?|.*\.md|(?!(?:vocab|merges)\.txt$).*\.txt",
    re.IGNORECASE,
)
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, merges
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?P<shard>-\d+-of-\d+)?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<index_variant>\w+))?\.json)?"
)
_WITH_WEIGHTS = ("StableDiffusionSafetyChecker", "CLIPVisionModelWithProjection", *MODEL_CLASSES)


def parts(model_index: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns part → class for each part in model_index.json that is not null; `where` names the file in errors.

    Raises UserError if a part's name is not a plain folder name.
    """
    found = {
        name: value[1]
        for name, value in model_index.items()
        if model_index_json.is_part(value) and value[1] is not None
    }
    return {places.plain_name(name, f"{where} names"): part_class for name, part_class in found.items()}


def documents(file_names: Iterable[str]) -> list[str]:
    """Returns the file names that are documents: model card, license, notices, other .md and .txt files."""
    return [name for name in file_names if _DOCUMENT.fullmatch(name)]


def of_copied_part(file_names: Iterable[str]) -> list[str]:
    """Returns the files to copy for a part that is not loaded: settings, documents and one set of weights.

    The weights are the ones that a loader finds first: safetensors before .bin, variants in the order of
    `weights.VARIANTS` and any other after them, a single file before shards.
    """
    file_names = list(file_names)
    chosen = set(documents(file_names)) | set(_one_arrangement(file_names))
    chosen |= {name for name in file_names if name.endswith(_SETTINGS) and ".index." not in name}
    return sorted(chosen)


def _one_arrangement(file_names: Iterable[str]) -> list[str]:
    groups: dict[tuple[bool, int, str], list[re.Match]] = {}
    for found in filter(None, map(_WEIGHTS.fullmatch, file_names)):
        variant = found["variant"] or found["index_variant"] or ""
        rank = weights.VARIANTS.index(variant) if variant in weights.VARIANTS else len(weights.VARIANTS)
        groups.setdefault((found["format"] == "bin", rank, variant), []).append(found)
    if not groups:
        return []
    group = groups[min(groups)]
    whole = [found for found in group if not found["shard"] and not found["index"]]
    return [found.string for found in whole or group]


def copied_files(root: pathlib.Path, name: str) -> list[str]:
    """Returns the files to copy for the part `name` of the model folder `root`, after checking that they are safe.

    Documents that are broken links are left out. Raises UserError for any other broken link, and for links out of the
    folder.
    """
    chosen = of_copied_part(places.file_names(root, name))
    lost = lost_documents(root / name, chosen)
    chosen = [file for file in chosen if file not in lost]
    for file in chosen:
        places.part_file(root, name, file)
    return chosen


def lost_documents(directory: pathlib.Path, file_names: Iterable[str]) -> list[str]:
    """Returns the documents that are broken links, as in a hub cache that lacks their blobs."""
    return [
        name for name in documents(file_names) if (directory / name).is_symlink() and not (directory / name).exists()
    ]


def check_copied(directory: pathlib.Path, part_class: str, source: pathlib.Path, there: Collection[str]) -> None:
    """Raises UserError if a copied part lacks a file that its class needs, or a file can't be read.

    Args:
      directory: the part or its copy.
      part_class: its class in model_index.json.
      source: the original part, for error messages.
      there: names of the copied files.
    """
    if part_class in ("CLIPTokenizer", "CLIPTokenizerFast"):
        if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= set(there):
            raise _lacks(source, "tokenizer.json, nor vocab.json and merges.txt")
    elif not any(name.endswith("config.json") for name in there):
        raise _lacks(source, "config.json")
    if part_class in _WITH_WEIGHTS and not any(weights.is_weights(name) for name in there):
        raise _lacks(source, "weights")
    for name in sorted(there):
        if name.endswith("config.json") or name in ("tokenizer.json", "vocab.json"):
            with _named(directory, source):
                json_file.read(directory / name)
        if ".index." in name:
            shards = json_file.read(directory / name, {"weight_map": json_file.TEXTS}).get("weight_map", {}).values()
            if lost := sorted(set(shards) - set(there)):
                raise UserError(f"{source / name} names missing files: {few(lost)}")
        if name.endswith(".safetensors"):
            with _named(directory, source):
                weights.read_header(directory / name)


@contextlib.contextmanager
def _named(directory: pathlib.Path, source: pathlib.Path) -> Iterator[None]:
    """Names the original part, instead of its copy, in the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(directory), str(source))) from None


def _lacks(source: pathlib.Path, what: str) -> UserError:
    other = f", or set {source.name} to [null, null] there" if source.name in OPTIONAL else ""
    return UserError(f"{source} holds no {what}, but model_index.json names {source.name}: add it{other}")
