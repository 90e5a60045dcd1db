"""Reading a diffusers pipeline folder as a whole; folder_writing.py writes one.

model_index.json            which component is of which class
unet/ vae/ text_encoder/    config.json and safetensors: read into arrays, written from arrays
scheduler/ tokenizer/ …     copied byte for byte
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from lcm_jax import json_file
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError, nearest
from lcm_jax.interop import hub, names, weights
from lcm_jax.models import FP32, MODEL_CLASSES, Network, Policy

Flat = dict[str, np.ndarray]

PIPELINE_CLASSES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
# These are neither run nor changed: their files are copied.
COPIED_CLASSES = (
    "StableDiffusionSafetyChecker",
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "CLIPVisionModelWithProjection",
)
_REQUIRED = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@dataclasses.dataclass(frozen=True)
class Source:
    """What of a component's files its parameters don't say: enough to write them back as they were.

    Attributes:
      keys: our path → key in the file.
      buffers: tensors of the file that are no parameters, by key.
      arrangement: the files, and which holds which key.
    """

    keys: dict[str, str]
    buffers: Flat
    arrangement: weights.Arrangement


@dataclasses.dataclass
class Component:
    """A network's configuration and parameters.

    Attributes:
      name: the subfolder, e.g. "unet".
      library_class: the peer's class, e.g. "UNet2DConditionModel".
      config: config.json as it is.
      params: path → array, in our names and layout and the file's dtype.
      source: how the file holds them; None for parameters that no file holds yet.
    """

    name: str
    library_class: str
    config: dict[str, Any]
    params: Flat
    source: Source | None = None

    def network(self, *, policy: Policy = FP32, **options: Any) -> Network:
        """Returns the network of this component; `options` as `lcm_jax.models.Network` takes them."""
        return make_network(self.library_class, self.config, where=self.name, policy=policy, **options)


@dataclasses.dataclass
class Folder:
    """A pipeline folder: JSON files as they are, networks as arrays.

    Attributes:
      path: where it lies; everything that isn't in `components` is copied from there when it is written.
      model_index, scheduler: model_index.json, scheduler/scheduler_config.json.
      components: the networks that were read, by name.
    """

    path: pathlib.Path
    model_index: dict[str, Any]
    scheduler: dict[str, Any]
    components: dict[str, Component]

    @property
    def pipeline_class(self) -> str:
        """The peer's pipeline class."""
        return self.model_index["_class_name"]

    @property
    def scheduler_class(self) -> str:
        """The peer's scheduler class."""
        return self.model_index["scheduler"][1]

    @property
    def schedule(self) -> Schedule:
        """The noise schedule that scheduler_config.json describes; raises UserError if it isn't supported."""
        try:
            return Schedule.from_config({**self.scheduler, "_class_name": self.scheduler_class})
        except UserError as error:
            raise UserError(f"{self.path}/scheduler/scheduler_config.json: {error}") from None


def make_network(
    library_class: str, config: dict[str, Any], *, where: str, policy: Policy = FP32, **options: Any
) -> Network:
    """Returns the network that a config.json describes; a UserError says `where`."""
    config_class, model_class = MODEL_CLASSES[library_class]
    try:
        return _network(model_class, config_class.from_dict(config), policy, tuple(sorted(options.items())))
    except UserError as error:
        raise UserError(f"{where}/config.json: {error}") from None


@functools.lru_cache(maxsize=32)
def _network(model_class: Any, config: Any, policy: Policy, options: tuple[tuple[str, Any], ...]) -> Network:
    """Kept, since finding the shapes of a full-size UNet takes seconds, and a network holds no arrays."""
    return Network(model_class, config, policy=policy, **dict(options))


def read_folder(path_or_hub_id: str | os.PathLike[str], *, only: Collection[str] | None = None) -> Folder:
    """Reads a folder that `StableDiffusionPipeline` or `LatentConsistencyModelPipeline` writes.

    Args:
      path_or_hub_id: a folder, or the id of a model on the Hugging Face hub.
      only: names of the networks whose weights are read; all by default.

    Raises:
      UserError: no such folder, a missing or broken file, an unsupported class or configuration, weights in pickle
        files, tensors missing, unexpected or of another shape than config.json says.
    """
    path = hub.local_folder(path_or_hub_id)
    model_index = json_file.read(path / "model_index.json", {"_class_name": json_file.TEXT})
    classes = _check_classes(path, model_index)
    scheduler = json_file.read(path / "scheduler" / "scheduler_config.json")
    components = {
        name: _read_component(path / name, name, library_class)
        for name, library_class in classes.items()
        if library_class in MODEL_CLASSES and (only is None or name in only)
    }
    folder = Folder(path, model_index, scheduler, components)
    _ = folder.schedule  # raises here, not in the middle of a run
    return folder


def _check_classes(path: pathlib.Path, model_index: dict[str, Any]) -> dict[str, str]:
    """Returns component → class; raises UserError for one that this program doesn't know, or that is missing."""
    where = path / "model_index.json"
    pipeline_class = str(model_index.get("_class_name"))
    if pipeline_class not in PIPELINE_CLASSES:
        raise UserError(f"{where}: _class_name is {pipeline_class}; supported: {', '.join(PIPELINE_CLASSES)}")
    classes: dict[str, str] = {}
    for name, value in model_index.items():
        if not (isinstance(value, list) and len(value) == 2) or value[1] is None:
            continue
        known = (*MODEL_CLASSES, *TOKENIZER_CLASSES, *COPIED_CLASSES)
        if name != "scheduler" and value[1] not in known:  # schedulers are checked with their configuration
            raise UserError(f"{where}: the class of {name} is {value[1]}; supported: {', '.join(known)}")
        classes[name] = value[1]
    for name in _REQUIRED:
        if name not in classes:
            raise UserError(f"{where} names no {name}{nearest(name, classes)}")
    return classes


def _read_component(directory: pathlib.Path, name: str, library_class: str) -> Component:
    config = json_file.read(directory / "config.json")
    network = make_network(library_class, config, where=str(directory))
    tensors, arrangement = weights.read_weights(directory)
    wanted = {path: tuple(leaf.shape) for path, leaf in network.shapes.items()}
    where = f"{directory}/{arrangement.index or next(iter(arrangement.metadata))}"
    found = names.match(library_class, {key: array.shape for key, array in tensors.items()}, wanted, where)
    params: Flat = {}
    written: dict[str, str] = {}  # old → new spelling, where the two differ
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
