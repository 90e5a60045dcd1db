"""Writes a diffusers pipeline folder: networks from their arrays, other parts and documents copied."""

import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lcm_jax.errors import UserError, few
from lcm_jax.host import json_file
from lcm_jax.interop import contents, names, places, weights
from lcm_jax.interop.folder import Component, Folder, Source, make_network
from lcm_jax.interop.recipe import RECIPE_FILE
from lcm_jax.interop.replace import keep_private, replacing
from lcm_jax.interop.tokenizer import read_tokenizer


def write_folder(folder: Folder, out: str | os.PathLike[str]) -> pathlib.Path:
    """Writes the folder: networks from their arrays, with the file layout they were read in; other parts copied.

    Attention weights of old VAE folders get their current names. All other names, dtypes, shards and the variant stay.
    Other variants and formats, and anything that model_index.json doesn't name, are left out, except documents. An
    existing model folder is replaced by a rename after everything is written and checked.

    Raises:
      UserError: as for `replacing` and `write_parts`.
    """
    with replacing(out, folder.path) as temporary:
        write_parts(folder, temporary)
    return pathlib.Path(out)


def write_parts(folder: Folder, to: pathlib.Path, *, recipe_holds: bool = True) -> None:
    """Writes model_index.json, all parts that it names and documents into an empty folder, and checks them.

    Args:
      folder: the folder to write.
      to: the empty folder.
      recipe_holds: whether to copy lcm_jax.json, because it still describes the denoiser.

    Raises:
      UserError: a part's name is not a plain name; a link leaves the folder; a part is missing or would not load.
      OSError: the files can't be written.
    """
    if not folder.path.is_dir():
        raise UserError(f"{folder.path} is missing; parts that are only copied are read from it")
    parts = contents.parts(folder.model_index, f"{folder.path}/model_index.json")
    write_json(to / "model_index.json", folder.model_index)
    _copy_documents(folder.path, to, also=(RECIPE_FILE,) if recipe_holds else ())
    for name, part_class in parts.items():  # parts that may be missing come first: writing weights is slow
        if name != "scheduler" and name not in folder.components:
            copied = contents.copied_files(folder.path, name)
            _copy_files(folder.path, name, to, copied)
            contents.check_copied(to / name, part_class, folder.path / name, copied)
            if name in folder.layout.tokenizers:
                read_tokenizer(folder.path / name)
    for name in parts:
        if name == "scheduler":
            (to / name).mkdir()
            write_json(to / name / "scheduler_config.json", folder.scheduler)
        elif name in folder.components:
            write_component(folder.components[name], to)
            _check_written(folder.components[name], to)
        else:
            continue
        _copy_files(folder.path, name, to, contents.documents(places.file_names(folder.path, name)))
        keep_private(to / name, folder.path / name)
    keep_private(to, folder.path)
    _warn_of_lost(folder.path, parts)


def write_component(component: Component, root: pathlib.Path) -> None:
    """Writes a component's config.json and weights to its subfolder of `root`."""
    directory = root / component.name
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", component.config)
    source = component.source or new_source(component)
    tensors = {key: names.to_file(path, component.params[path]) for path, key in source.keys.items()}
    dtypes = dict.fromkeys(tensors, component.dtype) if component.dtype else {}
    weights.write_weights(directory, {**tensors, **source.buffers}, source.arrangement, dtypes)


def new_source(component: Component) -> Source:
    """Returns the default layout, one file with the current keys, for parameters that were not read from a file."""
    stem = "model" if component.library_class.startswith("CLIP") else "diffusion_pytorch_model"
    keys = {path: names.file_key(path) for path in component.params}
    return Source(keys, {}, weights.one_file(f"{stem}.safetensors", list(keys.values())))


def replace_params(
    component: Component, params: Mapping[str, Any], dtype: np.dtype, config: dict[str, Any] | None = None
) -> Component:
    """Returns the component with new parameters, to be written as `dtype` to one file without a variant.

    Keys and buffers of the component's source are kept. Raises UserError if the parameters don't fit the network.
    """
    network = make_network(component.library_class, config or component.config, where=component.name)
    arrays = {path: np.asarray(array) for path, array in params.items()}
    network.check(arrays, where=component.name)
    new = Component(component.name, component.library_class, dict(config or component.config), arrays, dtype=dtype)
    source = new_source(new)
    if component.source:
        keys = {**source.keys, **{path: key for path, key in component.source.keys.items() if path in params}}
        buffers = component.source.buffers
        (name,) = source.arrangement.metadata
        source = Source(keys, buffers, weights.one_file(name, [*keys.values(), *buffers]))
    new.source = source
    return new


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object, indented by two spaces as in diffusers and transformers."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _copy_files(root: pathlib.Path, name: str, to: pathlib.Path, files: Sequence[str]) -> None:
    """Copies the given files of the part `name` byte for byte, except documents that are broken links."""
    lost = contents.lost_documents(root / name, files)
    if files:
        (to / name).mkdir(exist_ok=True)
    for file in files:
        if file not in lost:
            _copy(places.part_file(root, name, file), to / name / file)
    if files:
        keep_private(to / name, root / name)


def _copy_documents(root: pathlib.Path, to: pathlib.Path, also: tuple[str, ...]) -> None:
    there = sorted(path.name for path in root.iterdir() if not path.is_dir())
    lost = contents.lost_documents(root, there)
    for name in {*contents.documents(there), *also}.intersection(there).difference(lost):
        places.check_file(root / name, root)
        _copy(root / name, to / name)


def _warn_of_lost(root: pathlib.Path, parts: Iterable[str]) -> None:
    """Warns once about documents that are not copied because they are broken links."""
    lost = contents.lost_documents(root, sorted(path.name for path in root.iterdir()))
    for name in parts:
        lost += [f"{name}/{file}" for file in contents.lost_documents(root / name, places.file_names(root, name))]
    if lost:
        warnings.warn(
            f"{root}: links to missing files, which are not copied: {few(lost)}",
            UserWarning,
            stacklevel=2,
        )


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file; raises UserError if the source can't be opened, OSError if the target can't be written."""
    try:
        opened = source.open("rb")
    except OSError as error:
        raise UserError(f"{source} can't be read: {error.strerror or error}") from None
    with opened, target.open("xb") as file:
        shutil.copyfileobj(opened, file, 2**20)


def _check_written(component: Component, to: pathlib.Path) -> None:
    try:
        _check_fit(component, to / component.name)
    except UserError as error:
        raise UserError(f"the written folder can't be loaded: {str(error).replace(f'{to}/', '')}") from None


def _check_fit(component: Component, directory: pathlib.Path) -> None:
    """Raises UserError if the written config.json and weights don't fit each other; reads only the weight headers."""
    arrangement = component.source.arrangement if component.source else None
    file_names = arrangement.metadata if arrangement else [p.name for p in directory.glob("*.safetensors")]
    found: dict[str, tuple[int, ...]] = {}
    for name in file_names:
        found |= weights.read_shapes(directory / name)
    config = json_file.read(directory / "config.json")
    network = make_network(component.library_class, config, where=str(directory))
    wanted = {path: tuple(leaf.shape) for path, leaf in network.shapes.items()}
    names.match(component.library_class, found, wanted, str(directory))
