"""Writing a diffusers pipeline folder as a whole: networks from their arrays, everything else copied."""

import json
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from lcm_jax.interop import names, weights
from lcm_jax.interop.folder import Component, Folder, Source, make_network
from lcm_jax.interop.replace import replacing


def write_folder(folder: Folder, out: str | os.PathLike[str], *, changed: Collection[str] = ()) -> pathlib.Path:
    """Writes the folder: networks from their arrays in the files that they came in, everything else copied.

    Attention weights of old VAE folders get their present names; all other names, dtypes, shards and variants stay.
    An existing model folder is replaced, in one rename after everything is written.

    Args:
      changed: components whose arrays are not those that were read: other weight files of theirs are left behind.

    Raises:
      UserError: as `replacing` does.
    """
    with replacing(out, folder.path) as temporary:
        copy_rest(folder, temporary, skip_weights_of=changed)
        write_json(temporary / "model_index.json", folder.model_index)
        write_json(temporary / "scheduler" / "scheduler_config.json", folder.scheduler)
        for component in folder.components.values():
            write_component(component, temporary)
    return pathlib.Path(out)


def write_component(component: Component, root: pathlib.Path) -> None:
    """Writes config.json and weights of one component below `root`."""
    directory = root / component.name
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", component.config)
    source = component.source or new_source(component)
    tensors = {key: names.to_file(path, component.params[path]) for path, key in source.keys.items()}
    weights.write_weights(directory, {**tensors, **source.buffers}, source.arrangement)


def new_source(component: Component) -> Source:
    """Returns the usual single file with the usual keys, for parameters that don't come from a file."""
    stem = "model" if component.library_class.startswith("CLIP") else "diffusion_pytorch_model"
    keys = {path: names.file_key(path) for path in component.params}
    return Source(keys, {}, weights.one_file(f"{stem}.safetensors", list(keys.values())))


def replace_params(
    component: Component, params: Mapping[str, Any], dtype: np.dtype, config: dict[str, Any] | None = None
) -> Component:
    """Returns the component with other parameters, cast to `dtype`, to be written in one full-precision file.

    The spelling of CLIP's keys and its buffers stay as they were read.
    """
    network = make_network(component.library_class, config or component.config, where=component.name)
    cast = {path: np.asarray(array).astype(dtype) for path, array in params.items()}
    network.check(cast, where=component.name)
    new = Component(component.name, component.library_class, dict(config or component.config), cast)
    source = new_source(new)
    if component.source:
        keys = {**source.keys, **{path: key for path, key in component.source.keys.items() if path in params}}
        buffers = component.source.buffers
        (name,) = source.arrangement.metadata
        source = Source(keys, buffers, weights.one_file(name, [*keys.values(), *buffers]))
    new.source = source
    return new


def copy_rest(folder: Folder, to: pathlib.Path, skip_weights_of: Collection[str] = ()) -> None:
    """Copies every file that isn't written from `folder` itself, byte for byte; hidden folders are left behind.

    Args:
      skip_weights_of: components whose other weight files (variants, pickles) are left behind too: they hold the old
        parameters.
    """
    ours = {"model_index.json", "scheduler/scheduler_config.json"}
    for component in folder.components.values():
        ours.add(f"{component.name}/config.json")
        if component.source:
            ours.update(f"{component.name}/{name}" for name in component.source.arrangement.file_names)
    (to / "scheduler").mkdir(exist_ok=True)
    for root, directories, files in os.walk(folder.path):
        directories[:] = sorted(d for d in directories if not d.startswith("."))
        relative = pathlib.Path(root).relative_to(folder.path)
        for file in files:
            name = relative / file
            if name.as_posix() in ours:
                continue
            if name.parts[0] in skip_weights_of and weights.is_weights(file):
                continue
            (to / relative).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder.path / name, to / name)


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes a JSON object the way the peers do, indented by two."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
