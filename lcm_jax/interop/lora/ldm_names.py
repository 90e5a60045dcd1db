"""Names of diffusers UNet modules in the original Stable Diffusion code (LDM; "sgm" for SDXL).

    input_blocks.0.0       conv_in                           time_embed.0, .2      time_embedding.linear_1, .linear_2
    input_blocks.N.0, .1   a residual block, its transformer  label_emb.0.0, .0.2  add_embedding.linear_1, .linear_2
    input_blocks.N.0.op    a downsampler                      middle_block.0, .1, .2
    output_blocks.N.0, .1  a residual block, its transformer  out.2                conv_out
    output_blocks.N.1.conv an upsampler; N.2.conv in a level that has transformers

N counts blocks over all levels, so names depend on the number of layers and levels, which are inferred from the UNet's
modules.
"""

import itertools
import re
from collections.abc import Collection, Iterable

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_INNER = {
    "resnets": {
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
_MODULE = re.compile(
    r"((?:(?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)"
)


def ldm_names(modules: Iterable[str]) -> dict[str, str]:
    """Returns module → LDM name, for the UNet's linear layers and convolutions that have one."""
    split = {module: _MODULE.fullmatch(module) for module in modules}
    places = _places({found[1] for found in split.values() if found})
    names = {module: _OUTSIDE[module] for module in split if module in _OUTSIDE}
    for module, found in split.items():
        if found and found[1] in places:
            inner = _INNER.get(found[2], {}).get(found[3], found[3])
            names[module] = f"{places[found[1]]}.{inner}"
    return names


def _places(parts: Collection[str]) -> dict[str, str]:
    """Returns block → LDM name, for each residual block, transformer, downsampler and upsampler."""
    places = dict(_MIDDLE)
    number = 1  # 0 is conv_in
    for block, layers in _levels("down_blocks", parts):
        number = _place_layers(places, block, layers, "input_blocks", number)
        if f"{block}.downsamplers.0" in parts:
            places[f"{block}.downsamplers.0"] = f"input_blocks.{number}.0"
            number += 1
    number = 0
    for block, layers in _levels("up_blocks", parts):
        number = _place_layers(places, block, layers, "output_blocks", number)
        behind = 2 if f"{block}.attentions.0" in parts else 1
        places[f"{block}.upsamplers.0"] = f"output_blocks.{number - 1}.{behind}"
    return places


def _levels(way: str, parts: Collection[str]) -> Iterable[tuple[str, int]]:
    """Yields the name and the number of residual blocks of each level."""
    for level in itertools.count():
        block = f"{way}.{level}"
        layers = next(j for j in itertools.count() if f"{block}.resnets.{j}" not in parts)
        if not layers:
            return
        yield block, layers


def _place_layers(places: dict[str, str], block: str, layers: int, way: str, number: int) -> int:
    for layer in range(layers):
        places[f"{block}.resnets.{layer}"] = f"{way}.{number + layer}.0"
        places[f"{block}.attentions.{layer}"] = f"{way}.{number + layer}.1"
    return number + layers
