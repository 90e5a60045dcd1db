"""Configuration of UNet2DConditionModel."""

import dataclasses

# whether a block type has cross-attention
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Configuration of the UNet; names and defaults are those of diffusers' config.json, except `heads`."""

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

    @property
    def least_tensors(self) -> int:
        """A lower bound on the number of tensors: those of the down blocks' residual blocks and transformers."""
        attention = (
            CROSS[block] * n for block, n in zip(self.down_block_types, self.transformer_layers_per_block, strict=True)
        )
        return sum(layers * (8 + 20 * n) for layers, n in zip(self.layers_per_block, attention, strict=True))
