"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL, with the w-embedding of consistency models."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from lcm_jax.errors import one_of
from lcm_jax.models.attention import Transformer2DModel
from lcm_jax.models.blocks import REMAT, run_block, run_layer
from lcm_jax.models.kernels.attend import IMPLEMENTATIONS, Implementation
from lcm_jax.models.layers import ResnetBlock2D, TimestepEmbedding, conv, enlarge, sinusoid
from lcm_jax.models.norms import GroupNorm
from lcm_jax.models.policy import FP32, Policy
from lcm_jax.models.unet_config import UNetConfig


class Downsample2D(nnx.Module):
    """Stride-2 convolution, padded by one on each side."""

    def __init__(self, channels: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, stride=2, padding=1, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbour upsampling to `size`, then a convolution."""

    def __init__(self, channels: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.conv = conv(channels, channels, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
        return self.conv(enlarge(x, size))


class Block(nnx.Module):
    """One level of the UNet: residual blocks, each with a transformer if the level has any, then down- or upsampling.

    `depths` is the number of layers of each transformer, or zeros where the level has none.

    A down block returns its intermediate maps as skip connections; an up block consumes them.
    """

    def __init__(
        self,
        pairs: list[tuple[int, int]],
        level: int,
        config: UNetConfig,
        *,
        depths: tuple[int, ...],
        down: bool,
        up: bool,
        attention: Implementation,
        remat: str,
        policy: Policy,
        rngs: nnx.Rngs,
    ) -> None:
        channels, groups = config.block_out_channels[level], config.norm_num_groups
        time_dim = 4 * config.block_out_channels[0]
        self.cross, self.remat = any(depths), remat
        if self.cross:
            options = {"implementation": attention, "remat": remat, "policy": policy, "rngs": rngs}
            self.attentions = nnx.List(_transformer(config, level, depth, **options) for depth in depths)
        self.resnets = nnx.List(
            ResnetBlock2D(i, o, time_dim=time_dim, groups=groups, eps=config.norm_eps, policy=policy, rngs=rngs)
            for i, o in pairs
        )
        if down:
            self.downsamplers = nnx.List([Downsample2D(channels, policy=policy, rngs=rngs)])
        if up:
            self.upsamplers = nnx.List([Upsample2D(channels, policy=policy, rngs=rngs)])

    def down(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b e"], context: Float[Array, "b l d"]
    ) -> tuple[Float[Array, "b h2 w2 c2"], list[Array]]:
        """Returns the level's output and its skip connections."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = _scoped(f"resnets.{i}", _resnet, resnet, x, time, remat=self.remat)
            if self.cross:
                x = _scoped(f"attentions.{i}", self.attentions[i], x, context)
            skips.append(x)
        if hasattr(self, "downsamplers"):
            x = run_layer(Downsample2D.__call__, self.downsamplers[0], x, remat=self.remat)
            skips.append(x)
        return x, skips

    def up(
        self,
        x: Float[Array, "b h w c"],
        skips: list[Array],
        time: Float[Array, "b e"],
        context: Float[Array, "b l d"],
        size: tuple[int, int] | None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Returns the output; `skips` are in order of use, `size` is the next level's (None on the last level)."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            joined = jnp.concatenate([x, skip], axis=-1)
            x = _scoped(f"resnets.{i}", _resnet, resnet, joined, time, remat=self.remat)
            if self.cross:
                x = _scoped(f"attentions.{i}", self.attentions[i], x, context)
        if hasattr(self, "upsamplers"):
            upsample = functools.partial(Upsample2D.__call__, size=size)
            x = run_layer(upsample, self.upsamplers[0], x, remat=self.remat)
        return x


class MidBlock(nnx.Module):
    """A residual block at the lowest resolution; with `cross`, a transformer and a second residual block follow."""

    def __init__(
        self, config: UNetConfig, *, cross: bool, attention: Implementation, remat: str, policy: Policy, rngs: nnx.Rngs
    ) -> None:
        self.remat = remat
        channels, groups = config.block_out_channels[-1], config.norm_num_groups
        options = {"time_dim": 4 * config.block_out_channels[0], "groups": groups, "eps": config.norm_eps}
        if cross:
            of_transformer = {"implementation": attention, "remat": remat, "policy": policy, "rngs": rngs}
            self.attentions = nnx.List([_transformer(config, -1, config.mid_depth, **of_transformer)])
        self.resnets = nnx.List(
            ResnetBlock2D(channels, channels, **options, policy=policy, rngs=rngs) for _ in range(1 + cross)
        )

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b e"], context: Float[Array, "b l d"]
    ) -> Float[Array, "b h w c"]:
        x = _scoped("resnets.0", _resnet, self.resnets[0], x, time, remat=self.remat)
        for i, resnet in enumerate(self.resnets[1:], 1):
            x = _scoped(f"attentions.{i - 1}", self.attentions[i - 1], x, context)
            x = _scoped(f"resnets.{i}", _resnet, resnet, x, time, remat=self.remat)
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts noise, velocity or sample (the scheduler's prediction type) from noisy latent, timestep and text."""

    BLOCKS = ("down_blocks", "mid_block", "up_blocks")  # run by `run_block`, one at a time

    def __init__(
        self,
        config: UNetConfig,
        *,
        policy: Policy = FP32,
        remat: str = "none",
        attention: Implementation = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        one_of("remat", remat, REMAT)
        one_of("attention", attention, IMPLEMENTATIONS)
        self.config, self.policy, self.remat = config, policy, remat
        channels, dtype, n = config.block_out_channels, policy.compute, len(config.block_out_channels)
        options = {"attention": attention, "remat": remat, "policy": policy, "rngs": rngs}
        time_dim = 4 * channels[0]
        self.conv_in = conv(config.in_channels, channels[0], dtype=dtype, rngs=rngs)
        self.time_embedding = TimestepEmbedding(
            channels[0], time_dim, cond_dim=config.time_cond_proj_dim, policy=policy, rngs=rngs
        )
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim
            assert width is not None  # the reader of config.json checked it
            self.add_embedding = TimestepEmbedding(width, time_dim, policy=policy, rngs=rngs)
        downs, skips = [], [channels[0]]  # channels of the skip connections, in order
        for level in range(n):
            before = channels[max(level - 1, 0)]
            pairs = [
                (before if i == 0 else channels[level], channels[level]) for i in range(config.layers_per_block[level])
            ]
            last = level == n - 1
            downs.append(
                Block(
                    pairs,
                    level,
                    config,
                    depths=config.down_depths(level),
                    down=not last,
                    up=False,
                    **options,
                )
            )
            skips += [channels[level]] * (len(pairs) + (not last))
        self.down_blocks = nnx.List(downs)
        if config.mid_block_type:
            self.mid_block = MidBlock(config, cross=config.mid_block_type == "UNetMidBlock2DCrossAttn", **options)
        ups, x = [], channels[-1]
        for i, level in enumerate(reversed(range(n))):
            pairs = []
            for _ in range(config.layers_per_block[level] + 1):
                pairs.append((x + skips.pop(), channels[level]))
                x = channels[level]
            ups.append(Block(pairs, level, config, depths=config.up_depths(i), down=False, up=level > 0, **options))
        self.up_blocks = nnx.List(ups)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[0], config.norm_eps, policy=FP32)
        self.conv_out = conv(channels[0], config.out_channels, dtype=jnp.float32, rngs=rngs)

    def __call__(
        self,
        z: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        context: Float[Array, "b l d"],
        w_embedding: Float[Array, "b e"] | None = None,
        added: dict[str, Array] | None = None,
    ) -> Float[Array, "b h w o"]:
        """Returns the float32 prediction.

        Args:
          z: noisy latents.
          t: timesteps in 0..T-1, int or float32.
          context: text features.
          w_embedding: guidance embedding, for a UNet with `time_cond_proj_dim`.
          added: {'text_embeds': (b, p), 'time_ids': (b, 6)}, for SDXL.

        Raises:
          ValueError: `w_embedding` without `time_cond_proj_dim`, or `added` lacks a key that this UNet needs.
        """
        config, dtype = self.config, self.policy.compute
        if w_embedding is not None and not config.time_cond_proj_dim:
            raise ValueError("a w_embedding was given, but this UNet has no time_cond_proj_dim")
        if config.addition_embed_type and not {"text_embeds", "time_ids"} <= (added or {}).keys():
            raise ValueError("this UNet needs added={'text_embeds': (b, p), 'time_ids': (b, 6)}")
        sinusoids = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        time = self.time_embedding(sinusoid(t, config.block_out_channels[0], **sinusoids), w_embedding)
        if config.addition_embed_type and added:
            assert config.addition_time_embed_dim is not None  # the reader of config.json checked it
            ids = sinusoid(added["time_ids"].reshape(-1), config.addition_time_embed_dim, **sinusoids)
            ids = ids.reshape(len(z), -1)
            time = time + self.add_embedding(jnp.concatenate([added["text_embeds"].astype(jnp.float32), ids], axis=-1))
        time, context = time.astype(dtype), context.astype(dtype)

        x = self.conv_in(z.astype(dtype))
        skips = [x]
        for i, block in enumerate(self.down_blocks):
            x, more = _scoped(f"down_blocks.{i}", run_block, Block.down, block, x, time, context, remat=self.remat)
            skips += more
        if self.config.mid_block_type:
            x = _scoped("mid_block", run_block, MidBlock.__call__, self.mid_block, x, time, context, remat=self.remat)
        for i, block in enumerate(self.up_blocks):
            count = len(block.resnets)
            skips, taken = skips[:-count], skips[-count:][::-1]
            size = (skips[-1].shape[1], skips[-1].shape[2]) if skips else None
            up = functools.partial(Block.up, size=size)
            x = _scoped(f"up_blocks.{i}", run_block, up, block, x, taken, time, context, remat=self.remat)
        return self.conv_out(self.conv_norm_out(x, silu=True))


def _transformer(config: UNetConfig, level: int, depth: int, **options: Any) -> Transformer2DModel:
    """Returns the transformer of a level, with `depth` layers."""
    return Transformer2DModel(
        config.block_out_channels[level],
        config.cross_attention_dim,
        config.heads[level],
        depth,
        groups=config.norm_num_groups,
        linear=config.use_linear_projection,
        **options,
    )


_resnet = functools.partial(run_layer, ResnetBlock2D.__call__)


def _scoped(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the function under `jax.named_scope(name)`, for profiles."""
    with jax.named_scope(name):
        return function(*args, **kwargs)
