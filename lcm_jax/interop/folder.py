"""Reads a diffusers pipeline folder; folder_writing.py writes one.

model_index.json            class of each component
unet/ vae/ text_encoder/    config.json and safetensors, read into arrays
scheduler/                  scheduler_config.json, read as JSON
tokenizer/ …                copied byte for byte
"""

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError
from lcm_jax.host import json_file
from lcm_jax.interop import contents, hub, model_index, names, places, weights
from lcm_jax.interop.config_json import warn_of_unknown
from lcm_jax.interop.layouts import LAYOUTS, Layout
from lcm_jax.interop.network_configs import MODEL_CLASSES
from lcm_jax.interop.scheduler import KNOWN as SCHEDULER_KEYS
from lcm_jax.interop.scheduler import read_schedule
from lcm_jax.interop.weight_faults import check_finite
from lcm_jax.models import FP32, Flat, Network, Policy


@dataclasses.dataclass(frozen=True)
class Source:
    """How a component's files store its parameters; used to write them back unchanged.

    Attributes:
      keys: parameter path → key in the file.
      buffers: key → tensor that is not a parameter; written back unchanged.
      arrangement: the files, and the keys in each.
    """

    keys: dict[str, str]
    buffers: Flat
    arrangement: weights.Arrangement


@dataclasses.dataclass
class Component:
    """A network's configuration and parameters.

    Attributes:
      name: the subfolder, e.g. "unet".
      library_class: the class in diffusers or transformers, e.g. "UNet2DConditionModel".
      config: the content of config.json, unchanged.
      params: path → array, in this package's names and layout, in the file's dtype.
      source: how the files store the parameters; None if they were not read from files.
      dtype: to which the parameters are cast when they are written; None: their own.
    """

    name: str
    library_class: str
    config: dict[str, Any]
    params: Flat
    source: Source | None = None
    dtype: np.dtype | None = None

    def network(self, *, policy: Policy = FP32, **options: Any) -> Network:
        """Returns this component's network; `options` are passed to `lcm_jax.models.Network`."""
        return make_network(self.library_class, self.config, where=self.name, policy=policy, **options)


@dataclasses.dataclass
class Folder:
    """A pipeline folder in memory: JSON objects, and networks as arrays.

    Attributes:
      path: the folder on disk, from which parts that aren't in memory are copied on writing.
      model_index, scheduler: the contents of model_index.json and scheduler/scheduler_config.json.
      components: name → component, for the networks that were read.
    """

    path: pathlib.Path
    model_index: dict[str, Any]
    scheduler: dict[str, Any]
    components: dict[str, Component]

    @property
    def pipeline_class(self) -> str:
        """The diffusers pipeline class."""
        return self.model_index["_class_name"]

    @property
    def layout(self) -> Layout:
        """What folders of this pipeline class hold."""
        return LAYOUTS[self.pipeline_class]

    @property
    def scheduler_class(self) -> str:
        """The diffusers scheduler class."""
        return self.model_index["scheduler"][1]

    @property
    def schedule(self) -> Schedule:
        """The noise schedule in scheduler_config.json; raises UserError if it isn't supported."""
        try:
            return read_schedule({**self.scheduler, "_class_name": self.scheduler_class})
        except UserError as error:
            raise UserError(f"{self.path}/scheduler/scheduler_config.json: {error}") from None


def make_network(
    library_class: str, config: dict[str, Any], *, where: str, policy: Policy = FP32, **options: Any
) -> Network:
    """Returns the network for a config.json; `where` prefixes the message of a UserError."""
    known = MODEL_CLASSES[library_class]
    try:
        return _network(known.model, known.read(config), policy, tuple(sorted(options.items())))
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None


@functools.lru_cache(maxsize=32)
def _network(model_class: Any, config: Any, policy: Policy, options: tuple[tuple[str, Any], ...]) -> Network:
    """Returns a cached network: computing the shapes of a full-size UNet takes seconds; a network holds no arrays."""
    return Network(model_class, config, policy=policy, **dict(options))


def read_folder(path_or_hub_id: str | os.PathLike[str], *, only: Collection[str] | None = None) -> Folder:
    """Reads a folder saved by one of diffusers' pipelines in `layouts.LAYOUTS`.

    Warns once if optional parts that are only copied, such as a safety checker, can't be exported.

    Args:
      path_or_hub_id: a folder, or the id of a model on the Hugging Face Hub.
      only: names of the networks whose weights are read; all by default.

    Raises:
      UserError: the folder is missing; a file is missing or broken; a link leaves the folder; a class or configuration
        isn't supported; parts don't fit each other; weights are pickles or not finite; tensors are missing, unexpected
        or don't have the shape given by config.json.
    """
    path = hub.local_folder(path_or_hub_id)
    index, classes = model_index.read(path)
    layout = LAYOUTS[index["_class_name"]]
    _check_links(path, [name for name in classes if name not in layout.copied], layout)
    scheduler = _read_scheduler(path, index["_class_name"])
    for name in layout.tokenizers:
        _check_tokenizer(path / name)
    configs = {name: _read_config(path / name, library_class) for name, library_class in layout.networks.items()}
    layout.check_fit(path, **{name: read for name, (_, read) in configs.items()})
    components = {
        name: _read_component(path / name, name, layout.networks[name], config, read.least_tensors)
        for name, (config, read) in configs.items()
        if only is None or name in only
    }
    folder = Folder(path, index, scheduler, components)
    _ = folder.schedule  # fail early if unsupported
    _warn_of_copied(path, {name: classes[name] for name in layout.copied if name in classes})
    return folder


def _check_links(path: pathlib.Path, parts: Iterable[str], layout: Layout) -> None:
    """Raises UserError if a file to read or copy is a link out of the folder; `read_weights` checks the weights."""
    for name in parts:
        if name not in layout.networks and name != "scheduler":
            contents.copied_files(path, name)
            continue
        there = places.file_names(path, name)
        lost = contents.lost_documents(path / name, there)
        for file in there:
            if file in ("config.json", "scheduler_config.json", *contents.documents(there)) and file not in lost:
                places.part_file(path, name, file)


def _warn_of_copied(path: pathlib.Path, classes: dict[str, str]) -> None:
    """Warns once about parts that can't be copied, so that the user knows before training, not at export."""
    faults = []
    for name, part_class in classes.items():
        try:
            contents.check_copied(path / name, part_class, path / name, contents.copied_files(path, name))
        except UserError as error:
            faults.append(str(error))
    if faults:
        more = f" (and {len(faults) - 1} more such parts)" if len(faults) > 1 else ""
        warnings.warn(f"this model can be loaded but not exported: {faults[0]}{more}", UserWarning, stacklevel=3)


def _read_scheduler(path: pathlib.Path, pipeline_class: str) -> dict[str, Any]:
    where = path / "scheduler" / "scheduler_config.json"
    scheduler = json_file.read(where, largest=json_file.CONFIG)
    warn_of_unknown(scheduler, SCHEDULER_KEYS, str(where))
    if pipeline_class != "StableDiffusionPipeline" and scheduler.get("clip_sample"):  # which turns it off
        raise UserError(f"{where}: clip_sample is true, so {pipeline_class} would clip latents; supported: false")
    return scheduler


_LENGTH = json_file.Kind(  # at least a start and an end token; 10^30, also as 1e30, means "no limit"
    "a whole number, at least 2",
    lambda value: json_file.NUMBER.test(value) and (value >= 1e20 or (json_file.INTEGER.test(value) and value > 1)),
)


def _check_tokenizer(directory: pathlib.Path) -> None:
    where = directory / "tokenizer_config.json"
    if where.exists():  # old folders may hold only the vocabulary
        json_file.read(where, {"model_max_length": json_file.or_none(_LENGTH)})


def _read_config(directory: pathlib.Path, library_class: str) -> tuple[dict[str, Any], Any]:
    """Returns the content of config.json and the parsed configuration; warns about unknown keys."""
    where = directory / "config.json"
    config = json_file.read(where, largest=json_file.CONFIG)
    network_class = MODEL_CLASSES[library_class]
    try:
        read = network_class.read(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if network_class.known is not None:
        warn_of_unknown(config, network_class.known, str(where))
    return config, read


def _read_component(
    directory: pathlib.Path, name: str, library_class: str, config: dict[str, Any], least_tensors: int
) -> Component:
    tensors, arrangement = weights.read_weights(directory)
    where = f"{directory}/{arrangement.index or next(iter(arrangement.metadata))}"
    if len(tensors) < least_tensors:  # checked first: building a large network is slow
        raise UserError(
            f"{where}: its {len(tensors)} tensors don't fit the config.json beside it, which describes at least "
            f"{least_tensors}"
        )
    network = make_network(library_class, config, where=str(directory))
    wanted = {path: tuple(leaf.shape) for path, leaf in network.shapes.items()}
    found = names.match(library_class, {key: array.shape for key, array in tensors.items()}, wanted, where)
    files = {key: f"{directory}/{file}" for key, file in arrangement.shard_of.items()}
    check_finite({key: tensors[key] for key in found.keys.values()}, files)
    params: Flat = {}
    written: dict[str, str] = {}  # old → current key
    for path, key in found.keys.items():
        params[path] = names.from_file(path, tensors[key].reshape(names.file_shape(path, wanted[path])))
        if library_class == "AutoencoderKL":
            written[key] = names.file_key(path)
    source = Source(
        keys={path: written.get(key, key) for path, key in found.keys.items()},
        buffers={key: tensors[key] for key in found.buffers},
        arrangement=arrangement.renamed(written),
    )
    return Component(name, library_class, config, params, source)
