"""Reads the config.json of each supported network class of diffusers and transformers."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from lcm_jax.errors import UserError, one_of
from lcm_jax.host import json_file
from lcm_jax.host.json_file import Kind
from lcm_jax.interop.config_json import BLOCKS, LEVELS, SIZE, SIZES, check_fixed, check_size, per_level, read_values
from lcm_jax.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    UNet2DConditionModel,
    UNetConfig,
    VAEConfig,
)
from lcm_jax.models.clip import ACTIVATIONS
from lcm_jax.models.unet_config import CROSS, MIDDLES

_DEPTHS = Kind(f"{SIZES.name}, whose items may be such lists", json_file.or_list(SIZES, LEVELS).test)
_UNET_KINDS: dict[str, Kind] = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "block_out_channels": SIZES,
    "down_block_types": BLOCKS,
    "up_block_types": BLOCKS,
    "layers_per_block": SIZES,
    "transformer_layers_per_block": _DEPTHS,
    "reverse_transformer_layers_per_block": json_file.or_none(_DEPTHS),
    "mid_block_type": json_file.or_none(json_file.TEXT),
    "attention_head_dim": SIZES,
    "cross_attention_dim": SIZES,  # a list must have equal values
    "use_linear_projection": json_file.or_none(json_file.BOOLEAN),
    "norm_num_groups": SIZE,
    "norm_eps": json_file.POSITIVE,
    "flip_sin_to_cos": json_file.BOOLEAN,
    "freq_shift": json_file.NUMBER,
    "time_cond_proj_dim": json_file.or_none(SIZE),
    "addition_embed_type": json_file.or_none(json_file.TEXT),
    "addition_time_embed_dim": json_file.or_none(SIZE),
    "projection_class_embeddings_input_dim": json_file.or_none(SIZE),
    # latent size, one number or height and width; at most 1,024 (images of 8,192 pixels)
    "sample_size": json_file.or_none(json_file.or_list(json_file.up_to(1024), 2)),
}
_OFF = (None, False)
# Keys with the only supported values; any other value in a config.json is an error.
_UNET_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upcast_attention": (False, True, None),  # no effect: softmax is always float32; null in SDXL's file
    "center_input_sample": _OFF,
    "class_embed_type": _OFF,
    "class_embeddings_concat": _OFF,
    "cross_attention_norm": _OFF,
    "dual_cross_attention": _OFF,
    "encoder_hid_dim": _OFF,
    "encoder_hid_dim_type": _OFF,
    "mid_block_only_cross_attention": _OFF,
    "num_class_embeds": _OFF,
    "quantization_config": _OFF,
    "resnet_skip_time_act": _OFF,
    "time_embedding_act_fn": _OFF,
    "time_embedding_dim": _OFF,
    "timestep_post_act": _OFF,
}

_CHANNELS = Kind(
    "a list of numbers, one per latent channel",
    lambda value: isinstance(value, list) and all(map(json_file.NUMBER.test, value)),
)
_VAE_KINDS: dict[str, Kind] = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "down_block_types": BLOCKS,
    "up_block_types": BLOCKS,
    "block_out_channels": SIZES,
    "layers_per_block": SIZE,
    "latent_channels": SIZE,
    "norm_num_groups": SIZE,
    "scaling_factor": json_file.POSITIVE,
    "shift_factor": json_file.or_none(json_file.NUMBER),
    "latents_mean": json_file.or_none(_CHANNELS),
    "latents_std": json_file.or_none(_CHANNELS),
    "use_quant_conv": json_file.BOOLEAN,
    "use_post_quant_conv": json_file.BOOLEAN,
    "mid_block_add_attention": json_file.BOOLEAN,
}
_VAE_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "force_upcast": (True, False, None),  # no effect: dtypes follow the policy
    "quantization_config": None,
}

_CLIP_KINDS: dict[str, Kind] = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "projection_dim": Kind(  # 0 and null: no projection
        f"{SIZE.name}, 0, or null",
        lambda value: value is None or (value is not False and value == 0) or SIZE.test(value),
    ),
    "num_hidden_layers": SIZE,
    "num_attention_heads": SIZE,
    "max_position_embeddings": SIZE,
    "hidden_act": json_file.TEXT,
    "layer_norm_eps": json_file.POSITIVE,
    "eos_token_id": Kind("one token id", json_file.INTEGER.test),
}
# Keys that change the result or the weights in transformers or diffusers, with the values that have no effect. Other
# keys concern training, initialization and extra outputs.
_CLIP_FIXED: dict[str, Any] = {
    "use_attention_mask": (False, None),  # if true, diffusers' pipelines mask the padding
    "is_causal": True,
    "pruned_heads": ({}, None),
    "quantization_config": None,
    "fusion_config": None,
    "transformers_weights": None,  # name of another weight file
}


def read_unet(config: Mapping[str, Any]) -> UNetConfig:
    """Reads a config.json; raises UserError for unsupported values."""
    if config.get("num_attention_heads") is not None:  # diffusers raises an error too
        raise UserError("num_attention_heads is set; diffusers stores the number of heads as attention_head_dim")
    check_fixed({key: value for key, value in config.items() if key != "only_cross_attention"}, _UNET_FIXED)
    values = read_values(config, _UNET_KINDS)
    values.pop("sample_size", None)
    values["freq_shift"] = float(values.get("freq_shift", UNetConfig.freq_shift))
    channels = values.get("block_out_channels", UNetConfig.block_out_channels)
    levels = len(channels) if isinstance(channels, (list, tuple)) else 1
    values["block_out_channels"] = channels = per_level(channels, levels, "block_out_channels")
    _check_only_cross_attention(config, levels)
    values["use_linear_projection"] = bool(values.get("use_linear_projection"))
    widths = per_level(values.get("cross_attention_dim", UNetConfig.cross_attention_dim), levels, "cross_attention_dim")
    if len(set(widths)) > 1:
        raise UserError(f"cross_attention_dim is {list(widths)}; supported: one width for all levels")
    values["cross_attention_dim"] = widths[0]
    values["heads"] = per_level(values.pop("attention_head_dim", 8), levels, "attention_head_dim")
    values["layers_per_block"] = per_level(values.get("layers_per_block", 2), levels, "layers_per_block")
    values |= _depths(values, levels)
    if values.get("mid_block_type") is not None:
        one_of("mid_block_type", values["mid_block_type"], MIDDLES)
    for name in ("down_block_types", "up_block_types"):
        values[name] = per_level(values.get(name, getattr(UNetConfig, name)), levels, name)
        for block in values[name]:
            one_of(name, block, [b for b in CROSS if name.split("_")[0].title() in b])
    if values.get("addition_embed_type") not in (None, "text_time"):
        raise UserError(f"addition_embed_type is {values['addition_embed_type']!r}; supported: None, 'text_time'")
    if values.get("addition_embed_type"):
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            SIZE.check(name, values.get(name))
    groups = values.get("norm_num_groups", UNetConfig.norm_num_groups)
    for c, heads in zip(channels, values["heads"], strict=True):
        if c % heads or c % groups:
            raise UserError(f"block_out_channels has {c}, not a multiple of {heads} heads and {groups} norm groups")
    read = UNetConfig(**values)
    check_size(read.least_tensors)
    return read


def _depths(values: Mapping[str, Any], levels: int) -> dict[str, Any]:
    """Returns the numbers of transformer layers; raises UserError if they don't fit the levels and their blocks.

    A level's item may be a list, one number per transformer. diffusers then asks for the up blocks' list as well.
    """
    down, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    layers = values["layers_per_block"]
    read = {down: _depths_of(values.get(down, 1), down, layers)}
    if values.get(up) is not None:
        read[up] = _depths_of(values[up], up, tuple(n + 1 for n in layers[::-1]))
    elif any(isinstance(depth, tuple) for depth in read[down]):
        raise UserError(f"{down} has a list for a level; {up} must then be given, in the order of the up blocks")
    return read


def _depths_of(value: Any, key: str, counts: tuple[int, ...]) -> tuple[int | tuple[int, ...], ...]:
    depths = tuple(tuple(d) if isinstance(d, (list, tuple)) else d for d in per_level(value, len(counts), key))
    for depth, count in zip(depths, counts, strict=True):
        if isinstance(depth, tuple) and len(depth) != count:
            raise UserError(f"{key} has {list(depth)} for a block of {count} transformers; give one number for each")
    return depths


def _check_only_cross_attention(config: Mapping[str, Any], levels: int) -> None:
    """Raises UserError unless `only_cross_attention` is absent, false, or a list of one false per level."""
    key = "only_cross_attention"
    value = config.get(key)
    if isinstance(value, list) and value and all(item is False for item in value):
        per_level(value, levels, key)
    elif key in config:
        check_fixed({key: value}, _UNET_FIXED)


def read_vae(config: Mapping[str, Any]) -> VAEConfig:
    """Reads a config.json; raises UserError for unsupported values."""
    check_fixed(config, _VAE_FIXED)
    values = read_values(config, _VAE_KINDS)
    channels = values.get("block_out_channels", VAEConfig.block_out_channels)
    levels = len(channels) if isinstance(channels, (list, tuple)) else 1
    values["block_out_channels"] = channels = per_level(channels, levels, "block_out_channels")
    groups = values.get("norm_num_groups", VAEConfig.norm_num_groups)
    for c in channels:
        if c % groups:
            raise UserError(f"block_out_channels has {c}, not a multiple of {groups} norm groups")
    for name, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        values[name] = per_level(values.get(name, (block,)), levels, name)
        for value in values[name]:
            one_of(name, value, (block,))
    _read_channels(values)
    read = VAEConfig(**values)
    check_size(read.least_tensors)
    return read


def _read_channels(values: dict[str, Any]) -> None:
    """Turns the latents' mean and std into tuples; raises UserError unless they belong to the latent channels."""
    channels = values.get("latent_channels", VAEConfig.latent_channels)
    names = ("latents_mean", "latents_std")
    given = {name: tuple(map(float, values[name])) for name in names if values.get(name) is not None}
    for name, value in given.items():
        if len(value) != channels:
            raise UserError(f"{name} has {len(value)} values; latent_channels is {channels}")
    if len(given) == 1:
        raise UserError(f"{next(iter(given))} is given alone; {' and '.join(names)} belong together")
    if any(std <= 0 for std in given.get("latents_std", ())):
        raise UserError(f"latents_std is {list(given['latents_std'])}; its values must be positive")
    values.update(given)


def read_clip_text(config: Mapping[str, Any]) -> CLIPTextConfig:
    """Reads a config.json, or its `text_config` if it has one (a config with a vision tower), as transformers does.

    Raises:
      UserError: a value is invalid, or changes the result in a way that isn't implemented.
    """
    if "text_config" in config:
        json_file.OBJECT.check("text_config", config["text_config"])
        config = config["text_config"]
    one_of("model_type", config.get("model_type", "clip_text_model"), ("clip_text_model",))
    check_fixed(config, _CLIP_FIXED)
    values = read_values(config, _CLIP_KINDS)
    one_of("hidden_act", values.get("hidden_act", CLIPTextConfig.hidden_act), ACTIVATIONS)
    read = CLIPTextConfig(**values)
    if read.hidden_size % read.num_attention_heads:
        raise UserError(f"hidden_size is {read.hidden_size}, not a multiple of {read.num_attention_heads} heads")
    check_size(read.least_tensors)
    return read


@dataclasses.dataclass(frozen=True)
class NetworkClass:
    """One class of diffusers or transformers.

    Attributes:
      read: parses the JSON object of its config.json; raises UserError for values that aren't implemented.
      model: the Flax NNX module, a function of that configuration.
      known: the keys of its config.json; None if unknown keys aren't worth a warning.
    """

    read: Callable[[Mapping[str, Any]], Any]
    model: Any
    known: Collection[str] | None = None


MODEL_CLASSES = {
    "UNet2DConditionModel": NetworkClass(
        read_unet, UNet2DConditionModel, {*_UNET_KINDS, *_UNET_FIXED, "num_attention_heads"}
    ),
    "AutoencoderKL": NetworkClass(read_vae, AutoencoderKL, {*_VAE_KINDS, *_VAE_FIXED, "sample_size"}),
    # transformers writes many keys without effect
    "CLIPTextModel": NetworkClass(read_clip_text, CLIPTextModel),
    "CLIPTextModelWithProjection": NetworkClass(read_clip_text, CLIPTextModelWithProjection),
}
