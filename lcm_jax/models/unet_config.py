"""Configuration of UNet2DConditionModel."""

import dataclasses

# whether a block type has cross-attention
CROSS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
MIDDLES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")  # the second is a single residual block

Depths = tuple[int | tuple[int, ...], ...]  # per level: one number for all its transformers, or one per transformer


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Configuration of the UNet; names and defaults are those of diffusers' config.json, except `heads`."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: Depths = (1, 1, 1, 1)
    reverse_transformer_layers_per_block: Depths | None = None  # in the order of the up blocks
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"  # None: no middle block
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

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Returns the number of layers of each transformer in down block `level`; 0 where it has none."""
        return _each(*self._of_down_block(level))

    def up_depths(self, block: int) -> tuple[int, ...]:
        """Returns the number of layers of each transformer in up block `block`; 0 where it has none.

        Unless `reverse_transformer_layers_per_block` is given, they are those of the down block of the same level.
        """
        return _each(*self._of_up_block(block))

    @property
    def mid_depth(self) -> int:
        """The number of layers of the middle block's transformer, if it has one."""
        return _each(self.transformer_layers_per_block[-1], 1)[0]

    @property
    def least_tensors(self) -> int:
        """A lower bound on the number of tensors: those of the residual blocks and transformers of all levels."""
        levels = range(len(self.block_out_channels))
        blocks = [of(i) for of in (self._of_down_block, self._of_up_block) for i in levels]
        layers = (sum(depth) if isinstance(depth, tuple) else depth * count for depth, count in blocks)
        return sum(8 * count for _, count in blocks) + 20 * sum(layers)

    def _of_down_block(self, level: int) -> tuple[int | tuple[int, ...], int]:
        """Returns the layers of its transformers, 0 or () for none, and how many residual blocks it has."""
        cross = CROSS[self.down_block_types[level]]
        return cross * self.transformer_layers_per_block[level], self.layers_per_block[level]

    def _of_up_block(self, block: int) -> tuple[int | tuple[int, ...], int]:
        depths = self.reverse_transformer_layers_per_block or self.transformer_layers_per_block[::-1]
        return CROSS[self.up_block_types[block]] * depths[block], self.layers_per_block[::-1][block] + 1


def _each(depth: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    return depth or (0,) * count if isinstance(depth, tuple) else (depth,) * count
