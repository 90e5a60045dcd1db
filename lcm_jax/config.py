"""Every option of a run: frozen dataclasses that hold each default and check each value.

A config file (`configs/*.py`) starts from `default_config()`, the same tree as an `ml_collections.ConfigDict`, and
changes values only; the command line overrides single values (`--config.optimizer.learning_rate=1e-5`). `load()` turns
the result into a `Config`; nothing below this file sees a ConfigDict. A run stores it in `<workdir>/config.json`.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from lcm_jax.adapters.lora import LoraConfig
from lcm_jax.data.config import DataConfig
from lcm_jax.errors import UserError, nearest, one_of
from lcm_jax.host import files, json_file
from lcm_jax.monitor.profiler import ProfileConfig
from lcm_jax.objectives import OBJECTIVES
from lcm_jax.objectives.autoencoder import AutoencoderConfig
from lcm_jax.objectives.denoising import DenoisingConfig
from lcm_jax.objectives.lcd import LCDConfig
from lcm_jax.parallel.mesh import MeshConfig


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{name} is {getattr(config, name)}; it must be positive")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{name} is {getattr(config, name)}; it can't be negative")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained, starting from which folder, and in which numbers it computes."""

    folder: str = ""  # a diffusers folder, or a hub id: what training starts from, and the teacher of a distillation
    dtype: str = "float32"  # compute dtype; master weights and EMA are float32 under each: float32 | bfloat16
    # what the denoiser's backward pass recomputes: none | block: each block from its input | block_save_attention: the
    # same, but for the outputs of attention | layer: each residual block and transformer layer from its input, the
    # least memory where a block is a large part of the network (SDXL)
    remat: str = "none"
    # of the denoiser's large layers: xla | cudnn (bfloat16 on an NVIDIA GPU from Ampere on) | pallas (TPU) | auto: that
    # of the device, else xla
    attention: str = "auto"

    def __post_init__(self) -> None:
        if not self.folder:
            raise UserError("folder is empty; give a diffusers folder or a hub id")
        one_of("dtype", self.dtype, ("float32", "bfloat16"))
        one_of("remat", self.remat, ("none", "block", "block_save_attention", "layer"))
        one_of("attention", self.attention, ("auto", "xla", "cudnn", "pallas"))

    def attention_on(self, device: Any) -> str:
        """Returns what computes attention on this jax.Device: "xla", "cudnn" or "pallas".

        Raises: UserError for "cudnn" on another device than a GPU, or in float32.
        """
        if self.attention == "cudnn" and device.platform != "gpu":
            raise UserError(f"config.model.attention=cudnn needs a GPU; this device is a {device.platform.upper()}")
        if self.attention == "cudnn" and self.dtype == "float32":
            raise UserError("config.model.attention=cudnn computes in 16 bits; it needs config.model.dtype=bfloat16")
        if self.attention != "auto":
            return self.attention
        if device.platform == "tpu":
            return "pallas"
        # "9.0" on NVIDIA's H100; AMD's say "gfx90a" and the like
        capability = re.match(r"(\d+)\.", getattr(device, "compute_capability", ""))
        return "cudnn" if capability and int(capability[1]) >= 8 and self.dtype == "bfloat16" else "xla"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Adafactor with a linear warm-up, then a constant or cosine learning rate, clipped by global norm."""

    # adamw: two moments per weight | adafactor: hardly any memory, a mean of squares per row and per column of a weight
    # (of at least 128 each), and no mean of gradients; each weight's update is clipped to a root mean square of 1
    name: str = "adamw"
    # of AdamW's two moments: float32 | bfloat16: half the memory; the mean of squares is rounded stochastically
    moments_dtype: str = "float32"
    learning_rate: float = 1e-5  # after the warm-up
    warmup_steps: int = 0  # steps over which the learning rate rises linearly from zero
    decay: str = "constant"  # constant | cosine (to zero at the last step)
    b1: float = 0.9  # decay of the mean of gradients
    b2: float = 0.999  # decay of the mean of squared gradients
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled, times the learning rate
    clip_norm: float = 1.0  # max of the gradient's norm; 0: no clipping

    def __post_init__(self) -> None:
        _positive(self, "learning_rate", "eps")
        _not_negative(self, "warmup_steps", "weight_decay", "clip_norm")
        one_of("name", self.name, ("adamw", "adafactor"))
        one_of("moments_dtype", self.moments_dtype, ("float32", "bfloat16"))
        one_of("decay", self.decay, ("constant", "cosine"))
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("moments_dtype", "b1", "b2", "eps"):
            if self.name == "adafactor" and getattr(self, name) != getattr(OptimizerConfig, name):
                raise UserError(f"{name} has no effect: name is 'adafactor'")


@dataclasses.dataclass(frozen=True)
class EMAConfig:
    """The exponential moving average of the weights: the target of LCD, and what is exported."""

    decay: float = 0.95  # 0: no average is kept; LCD's target is then the student itself, its gradient stopped
    warmup: bool = False  # start with decay (1 + step) / (10 + step), so that the first weights are soon forgotten

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"decay is {self.decay}; it must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the run's whole state is written, and how much of it is kept."""

    every: int = 500  # steps between checkpoints; a run that ends or is stopped writes one too
    keep_last: int = 2  # number of newest checkpoints that are kept
    keep_every: int = 0  # also keep each checkpoint whose step is a multiple of this; 0: none

    def __post_init__(self) -> None:
        _positive(self, "every", "keep_last")
        _not_negative(self, "keep_every")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is seen of a run while it trains. Nothing here changes the result."""

    every: int = 10  # steps between TensorBoard scalars
    samples_every: int = 500  # steps between sample grids; 0: none
    prompts: tuple[str, ...] = ()  # one image of a sample grid for each
    sample_steps: int = 4  # network steps per image of a grid
    guidance_scale: float = 8.0  # of the sample grids; w + 1

    def __post_init__(self) -> None:
        _positive(self, "every", "sample_steps")
        _not_negative(self, "samples_every")
        if not math.isfinite(self.guidance_scale):
            raise UserError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig
    objective: str = "lcd"  # lcd (distillation) | denoising (a diffusion model, a fine-tune) | autoencoder (a VAE)
    seed: int = 0  # of all random numbers of a run, 0 … 2^32 - 1
    steps: int = 1000  # of the whole run
    batch_size: int = 32  # images per step, over all devices
    accumulate: int = 1  # micro-batches per batch, computed one after the other to save memory
    max_skipped: int = 5  # a run stops after this many non-finite losses or gradients in a row; none changes weights
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    ema: EMAConfig = dataclasses.field(default_factory=EMAConfig)
    lcd: LCDConfig = dataclasses.field(default_factory=LCDConfig)
    denoising: DenoisingConfig = dataclasses.field(default_factory=DenoisingConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        one_of("objective", self.objective, OBJECTIVES)
        _positive(self, "steps", "batch_size", "accumulate", "max_skipped")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must be in 0 … {2**32 - 1}")
        objective = OBJECTIVES[self.objective]
        if self.data.latents and "images" in objective.needs:
            raise UserError(f"data.latents is true, but the objective {self.objective!r} is trained on images")
        objective.check(getattr(self, self.objective), bool(self.lora.rank))
        for name in OBJECTIVES:
            section = getattr(self, name)
            if name != self.objective and section != type(section)():
                changed = [f.name for f in dataclasses.fields(section) if getattr(section, f.name) != f.default]
                raise UserError(f"{name}.{changed[0]} has no effect: objective is {self.objective!r}")


_SECTIONS: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}
OUTSIDE_THE_STEP = ("max_skipped", "checkpoint", "log", "profile")  # these don't change the compiled step
_FREE_ON_RESUME = (*OUTSIDE_THE_STEP, "steps", "accumulate", "mesh")  # what a step computes changes by rounding only
_FREE_DATA = ("data.threads", "data.max_pixels")  # so that a run that met a larger image can resume with more
# where inputs lie, which may differ from host to host: that their content is the same is for identity.py to say
PLACES = ("model.folder", "data.directory", "data.data_dir")


def default_config() -> ConfigDict:
    """Returns every option with its default, as the ConfigDict that a config file changes and returns."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(Config):
        if field.name in _SECTIONS:
            tree[field.name] = {f.name: f.default for f in dataclasses.fields(_SECTIONS[field.name])}
        else:
            tree[field.name] = field.default
    return ConfigDict(tree)


def from_dict(tree: dict[str, Any], where: str = "config") -> Config:
    """Builds a checked Config from nested plain values; raises UserError that names the option."""
    known = {f.name for f in dataclasses.fields(Config)}
    for name in tree:
        if name not in known:
            raise UserError(f"{where}.{name} is not an option{nearest(name, known)}")
    values = {name: value for name, value in tree.items() if name not in _SECTIONS}
    for name, section in _SECTIONS.items():
        fields = {f.name: f for f in dataclasses.fields(section)}
        given = dict(tree.get(name, {}))
        for key, value in given.items():
            if key not in fields:
                raise UserError(f"{where}.{name}.{key} is not an option{nearest(key, fields)}")
            if isinstance(value, list):
                given[key] = tuple(value)
        try:
            values[name] = section(**given)
        except UserError as error:
            raise UserError(f"{where}.{name}.{error}") from None
    try:
        return Config(**values)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def resolved(config: Config) -> str:
    """Returns the whole configuration as JSON, the content of `<workdir>/config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def load_resolved(workdir: epath.PathLike, places: Mapping[str, str] | None = None) -> Config:
    """Reads `<workdir>/config.json`.

    Args:
      workdir: the run's folder. If it comes from another machine or checkout, a model folder that is part of lcm_jax is
        found in this installation.
      places: option → value, for the keys of PLACES: where the run's inputs lie now.

    Raises: UserError if `workdir` isn't a run's folder.
    """
    path = epath.Path(workdir) / "config.json"
    try:
        with files.one_line(path, "read"):
            if not path.exists():
                raise UserError(f"{workdir} is not a run of lcm_jax: it has no config.json")
            text = path.read_text()
        tree = json_file.parse(text, str(path))
        if folder := tree.get("model", {}).get("folder"):
            tree["model"]["folder"] = _in_this_installation(folder)
        for name, value in (places or {}).items():
            section, key = name.split(".")
            tree.setdefault(section, {})[key] = value
        return from_dict(tree, where=str(path))
    except UserError:
        raise
    except (ValueError, AttributeError, TypeError) as error:  # JSON of another shape among them
        raise UserError(f"{path} can't be read: {error}") from None


def _in_this_installation(folder: str) -> str:
    path = pathlib.Path(folder)
    own = pathlib.Path(__file__).parent / "assets" / path.name
    is_asset = path.parts[-3:-1] == own.parts[-3:-1]
    return str(own) if is_asset and own.is_dir() and not path.exists() else folder


def facts(config: Config) -> dict[str, str]:
    """Returns option → value of all that processes of one run must have alike: not their paths, nor their threads."""
    found = {}
    for name, value in dataclasses.asdict(config).items():
        options = {f"{name}.{key}": of for key, of in value.items()} if name in _SECTIONS else {name: value}
        found |= {f"config.{key}": repr(of) for key, of in options.items() if key not in (*PLACES, "data.threads")}
    return found


def check_same_run(config: Config, stored: Config, workdir: epath.PathLike, *, places: bool = True) -> None:
    """Raises UserError if `config` would compute other steps than the run that `stored` began in `workdir`.

    Args: places: whether inputs must lie where they lay; False where their content is compared.
    """
    free = (*_FREE_DATA, *(() if places else PLACES))
    new, old = dataclasses.asdict(config), dataclasses.asdict(stored)
    for name in new:
        if name in _FREE_ON_RESUME and not (name == "steps" and config.optimizer.decay == "cosine"):
            continue
        pairs = (
            [(f"{name}.{k}", new[name][k], old[name][k]) for k in new[name]]
            if name in _SECTIONS
            else [(name, new[name], old[name])]
        )
        for key, now, then in pairs:
            if now != then and key not in free:
                why = ", and its learning rate falls to zero over them" if key == "steps" else ""
                raise UserError(
                    f"{workdir} holds a run with config.{key}={then!r}, not {now!r}{why}; "
                    "choose another --workdir, or delete this one to start over"
                )
