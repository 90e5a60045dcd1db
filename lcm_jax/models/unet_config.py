"""Configuration of UNet2DConditionModel, read from config.json."""

import dataclasses
from typing import Any, ClassVar

from lcm_jax.errors import UserError, one_of
from lcm_jax.host import json_file
from lcm_jax.models.config_json import BLOCKS, SIZE, SIZES, check_fixed, check_size, per_level, read_values

# whether a block type has cross-attention
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}

KINDS: dict[str, json_file.Kind] = {
    "in_channels": SIZE,
    "out_channels": SIZE,
    "block_out_channels": SIZES,
    "down_block_types": BLOCKS,
    "up_block_types": BLOCKS,
    "layers_per_block": SIZES,
    "transformer_layers_per_block": SIZES,
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
    "reverse_transformer_layers_per_block": _OFF,
    "time_embedding_act_fn": _OFF,
    "time_embedding_dim": _OFF,
    "timestep_post_act": _OFF,
}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Configuration of the UNet; names and defaults are those of diffusers' config.json, except `heads`."""

    KNOWN: ClassVar = {*KINDS, *FIXED, "num_attention_heads"}

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    heads: tuple[int, ...] = (8, 8, 8, 8)  # heads per level; called `attention_head_dim` in the file
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
        """Reads a config.json; raises UserError for unsupported values."""
        if config.get("num_attention_heads") is not None:  # diffusers raises an error too
            raise UserError("num_attention_heads is set; diffusers stores the number of heads as attention_head_dim")
        check_fixed({key: value for key, value in config.items() if key != "only_cross_attention"}, FIXED)
        values = read_values(config, KINDS)
        values.pop("sample_size", None)
        values["freq_shift"] = float(values.get("freq_shift", cls.freq_shift))
        channels = values.get("block_out_channels", cls.block_out_channels)
        levels = len(channels) if isinstance(channels, (list, tuple)) else 1
        values["block_out_channels"] = channels = per_level(channels, levels, "block_out_channels")
        _check_only_cross_attention(config, levels)
        values["use_linear_projection"] = bool(values.get("use_linear_projection"))
        widths = per_level(values.get("cross_attention_dim", cls.cross_attention_dim), levels, "cross_attention_dim")
        if len(set(widths)) > 1:
            raise UserError(f"cross_attention_dim is {list(widths)}; supported: one width for all levels")
        values["cross_attention_dim"] = widths[0]
        values["heads"] = per_level(values.pop("attention_head_dim", 8), levels, "attention_head_dim")
        for name, default in (("layers_per_block", 2), ("transformer_layers_per_block", 1)):
            values[name] = per_level(values.get(name, default), levels, name)
        for name in ("down_block_types", "up_block_types"):
            values[name] = per_level(values.get(name, getattr(cls, name)), levels, name)
            for block in values[name]:
                one_of(name, block, [b for b in CROSS if name.split("_")[0].title() in b])
        if values.get("addition_embed_type") not in (None, "text_time"):
            raise UserError(f"addition_embed_type is {values['addition_embed_type']!r}; supported: None, 'text_time'")
        if values.get("addition_embed_type"):
            for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
                SIZE.check(name, values.get(name))
        groups = values.get("norm_num_groups", cls.norm_num_groups)
        for c, heads in zip(channels, values["heads"], strict=True):
            if c % heads or c % groups:
                raise UserError(f"block_out_channels has {c}, not a multiple of {heads} heads and {groups} norm groups")
        self = cls(**values)
        check_size(self.least_tensors)
        return self

    @property
    def least_tensors(self) -> int:
        """A lower bound on the number of tensors: those of the down blocks' residual blocks and transformers."""
        attention = (
            CROSS[block] * n for block, n in zip(self.down_block_types, self.transformer_layers_per_block, strict=True)
        )
        return sum(layers * (8 + 20 * n) for layers, n in zip(self.layers_per_block, attention, strict=True))


def _check_only_cross_attention(config: dict[str, Any], levels: int) -> None:
    """Raises UserError unless `only_cross_attention` is absent, false, or a list of one false per level."""
    key = "only_cross_attention"
    value = config.get(key)
    if isinstance(value, list) and value and all(item is False for item in value):
        per_level(value, levels, key)
    elif key in config:
        check_fixed({key: value}, FIXED)
