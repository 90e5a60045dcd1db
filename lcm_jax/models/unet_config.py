"""A UNet2DConditionModel's config.json: what is read of it and what is refused."""

import dataclasses
from typing import Any

from lcm_jax.errors import UserError, one_of
from lcm_jax.models.config_json import (
    booleans,
    check,
    numbers,
    per_level,
    whole_numbers,
    whole_numbers_or_none,
    whole_numbers_per_level,
)

# whether a block has attention to the text
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}

# What this port does not vary: any other value in a config.json is an error that names it.
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "upcast_attention": (False, True, None),  # softmax is float32 anyway; SDXL's file says null
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The values of a UNet's config.json that its shape depends on; names and defaults are the file format's."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # `attention_head_dim` in the file: a misnomer of the format
    cross_attention_dim: int = 1280
    use_linear_projection: bool = False
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    time_cond_proj_dim: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "UNetConfig":
        """Reads a config.json; raises UserError for a value that isn't supported."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "heads"]
        if config.get("num_attention_heads") is not None:  # the peer refuses it too
            raise UserError("num_attention_heads is set; the format gives the number of heads as attention_head_dim")
        check(config, [*names, "attention_head_dim", "sample_size"], FIXED)
        values = {name: config[name] for name in names if name in config}
        added = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        whole_numbers(values, ("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups"))
        whole_numbers_or_none(values, ("time_cond_proj_dim", *added))
        numbers(values, ("norm_eps",), positive=True)
        numbers(values, ("freq_shift",), positive=False)
        values["freq_shift"] = float(values.get("freq_shift", cls.freq_shift))
        booleans(values, ("use_linear_projection", "flip_sin_to_cos"))
        channels = values.get("block_out_channels", cls.block_out_channels)
        levels = len(channels) if isinstance(channels, (list, tuple)) else 1
        values["block_out_channels"] = channels = whole_numbers_per_level(channels, levels, "block_out_channels")
        values["heads"] = whole_numbers_per_level(config.get("attention_head_dim", 8), levels, "attention_head_dim")
        for name, default in (("layers_per_block", 2), ("transformer_layers_per_block", 1)):
            values[name] = whole_numbers_per_level(values.get(name, default), levels, name)
        for name in ("down_block_types", "up_block_types"):
            values[name] = per_level(values.get(name, getattr(cls, name)), levels, name)
            for block in values[name]:
                one_of(name, block, [b for b in CROSS if name.split("_")[0].title() in b])
        if values.get("addition_embed_type") not in (None, "text_time"):
            raise UserError(f"addition_embed_type is {values['addition_embed_type']!r}; supported: None, 'text_time'")
        if values.get("addition_embed_type"):
            whole_numbers({name: values.get(name) for name in added}, added)
        groups = values.get("norm_num_groups", cls.norm_num_groups)
        for c, heads in zip(channels, values["heads"], strict=True):
            if c % heads or c % groups:
                raise UserError(f"block_out_channels has {c}, no multiple of {heads} heads and of {groups} norm groups")
        return cls(**values)
