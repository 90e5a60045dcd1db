"""A LoRA's alpha where it is no tensor: peft's configuration, in a file's header or in adapter_config.json.

    {"r": 64, "lora_alpha": 32, "alpha_pattern": {"mid_block.resnets.0.conv1": 8}, "rank_pattern": {}, …}

diffusers' `save_lora_weights` writes it under the header's key `lora_adapter_metadata`, as JSON, each name with its
component before it (`unet.lora_alpha`), if it is told to; a model's own `save_lora_adapter` leaves that out. Where
nobody says anything, alpha is the rank.
"""

import collections
import math
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from lcm_jax import json_file
from lcm_jax.errors import UserError
from lcm_jax.interop.lora_keys import TEXT_MODEL

METADATA_KEY = "lora_adapter_metadata"
CONFIG_FILE = "adapter_config.json"
_OPTIONS = ("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_dora", "use_rslora")


def configs_of_header(header: Mapping[str, str] | None, components: Collection[str]) -> dict[str, dict[str, Any]]:
    """Returns component → peft's configuration, from the header of a file with tensors of these components.

    Raises:
      UserError: it can't be read; it doesn't say which of several components it is for.
    """
    text = (header or {}).get(METADATA_KEY)
    if not text:
        return {}
    values = json_file.parse(text, f"{METADATA_KEY} in its header")
    if any(option in values for option in _OPTIONS):
        if len(components) > 1:
            raise UserError(f"{METADATA_KEY} in its header doesn't say for which of {', '.join(components)} it is")
        return dict.fromkeys(components, values)
    configs: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for name, value in values.items():
        component, _, option = name.partition(".")
        configs[component][option] = value
    return dict(configs)


def config_beside(file: pathlib.Path) -> dict[str, Any] | None:
    """Returns the adapter_config.json in the file's folder or in the one around it; None if there is none.

    The one around it is where diffusers' own script for LCM-LoRA leaves it.
    """
    for folder in (file.absolute().parent, file.absolute().parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return json_file.read(folder / CONFIG_FILE)
    return None


def alpha_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns the alpha of a module, for which dW = alpha / rank · B A, as peft finds it.

    Raises:
      UserError: it isn't a number; the configuration is a DoRA's.
    """
    if config.get("use_dora"):
        raise UserError("it holds a DoRA (use_dora); only plain LoRA of linear layers and convolutions is read")
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"its alpha_pattern should be a JSON object, found {type(patterns).__name__}")
    for pattern, value in patterns.items():
        try:
            spelled = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise UserError(f"its alpha_pattern has {pattern!r}, no regular expression: {error}") from None
        if spelled.match(module) or spelled.match(TEXT_MODEL + module):  # the latter up to transformers 4
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"the alpha of {module} is {alpha!r}; it must be a number")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else float(alpha)  # rsLoRA divides by sqrt(rank)


def header_of(component: str, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Returns the entries of the header's JSON for one component: what is most frequent, and the modules that differ.

    Args:
      ranks, alphas: module → value, modules without the prefix `text_model.`.
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
