"""LoRA alphas that are not stored as tensors but in peft's configuration, in a file's header or adapter_config.json.

    {"r": 64, "lora_alpha": 32, "alpha_pattern": {"mid_block.resnets.0.conv1": 8}, "rank_pattern": {}, …}

diffusers' `save_lora_weights` can write it as JSON under the header key `lora_adapter_metadata`, with the component as
a prefix (`unet.lora_alpha`); a model's `save_lora_adapter` omits the prefix. Without a configuration, alpha = rank.
"""

import collections
import math
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from lcm_jax.errors import UserError, plain
from lcm_jax.host import json_file
from lcm_jax.interop.lora import patterns
from lcm_jax.interop.lora.keys import TEXT_MODEL

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
_LARGEST = 3.4e38  # about the float32 maximum
_OPTIONS = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora")


def configs_of_header(header: Mapping[str, str] | None, components: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns component → peft configuration from a file's header; `components` are those with tensors in the file.

    Raises:
      UserError: the configuration can't be read, or has no component prefix in a file for several components.
    """
    text = (header or {}).get(METADATA_KEY)
    if not text:
        return {}
    values = json_file.parse(text, f"{METADATA_KEY} in its header")
    if any(option in values for option in _OPTIONS):
        if len(components) > 1:
            raise UserError(f"{METADATA_KEY} in its header doesn't name its component, one of {', '.join(components)}")
        return dict.fromkeys(components, values)
    configs: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, value in values.items():
        component, _, option = name.partition(".")
        configs[component][option] = value
    return dict(configs)


def config_beside(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the adapter_config.json in the file's folder or its parent, None if there is none.

    diffusers' LCM-LoRA training script writes it to the parent folder.
    """
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return json_file.read(folder / CONFIG_FILE)
    return None


class Alphas:
    """Alphas of modules in a peft configuration, found as peft does; dW = alpha / rank · B A."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Takes a peft configuration, or {} for none; raises UserError for DoRA and unsupported patterns."""
        if config.get("use_dora"):
            raise UserError(
                "it holds a DoRA (use_dora); only plain LoRA of linear layers and convolutions is supported"
            )
        self._config = config
        self._of_pattern = config.get("alpha_pattern") or {}
        if not isinstance(self._of_pattern, dict):
            raise UserError(f"its alpha_pattern should be a JSON object, found {type(self._of_pattern).__name__}")
        self._patterns = patterns.Patterns(self._of_pattern, "alpha_pattern")

    def of(self, module: str, rank: int) -> float:
        """Returns a module's alpha, `rank` by default; raises UserError if it is not a finite number."""
        pattern = self._patterns.first(module, TEXT_MODEL + module)  # text encoder path up to transformers 4
        alpha = self._config.get("lora_alpha", rank) if pattern is None else self._of_pattern[pattern]
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not is_alpha(alpha):
            raise UserError(f"the alpha of {module} is {plain(repr(alpha), 100)}; it must be a number")
        return alpha * math.sqrt(rank) if self._config.get("use_rslora") else float(alpha)  # rsLoRA: alpha / sqrt(rank)


def is_alpha(value: float) -> bool:
    """Returns whether a number is finite in float32, the dtype in which weight differences are computed."""
    return abs(value) <= _LARGEST


def header_of(component: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Returns a component's entries for `lora_adapter_metadata`: the most frequent rank and alpha, and exceptions.

    Args:
      component: prefix of the entries.
      ranks, alphas: module → value; modules are without the prefix `text_model.`.
    """
    rank = collections.Counter(ranks.values()).most_common(1)[0][0]
    alpha = collections.Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {m: value for m, value in ranks.items() if value != rank},
        "alpha_pattern": {m: _plain(value) for m, value in alphas.items() if value != alpha},
        "target_modules": sorted(ranks),
    }
    return {f"{component}.{option}": value for option, value in config.items()}


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha
