"""Layers shared by the UNet and the autoencoder, in NHWC."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from lcm_jax.models.kernels.convolution import convolve
from lcm_jax.models.norms import GroupNorm
from lcm_jax.models.policy import Policy


def sinusoid(
    t: Num[Array, " b"], dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0
) -> Float[Array, "b dim"]:
    """Returns float32 sinusoidal features of timesteps (DDPM, arXiv 2006.11239).

    As in diffusers, `flip_sin_to_cos` puts cosines first, `freq_shift` is subtracted from the exponents' divisor
    dim // 2, and an odd `dim` is padded with a zero.
    """
    half = dim // 2
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angle = t.astype(jnp.float32)[:, None] * frequency
    parts = (jnp.cos(angle), jnp.sin(angle)) if flip_sin_to_cos else (jnp.sin(angle), jnp.cos(angle))
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


def conv(
    c_in: int, c_out: int, size: int = 3, *, stride: int = 1, padding: Any = None, dtype: Any, rngs: nnx.Rngs
) -> nnx.Conv:
    """Returns a square convolution; the default padding is size // 2, which keeps the size at stride 1."""
    pad = size // 2 if padding is None else padding
    return nnx.Conv(
        c_in, c_out, (size, size), strides=stride, padding=pad, conv_general_dilated=convolve, dtype=dtype, rngs=rngs
    )


class TimestepEmbedding(nnx.Module):
    """Two-layer MLP on sinusoidal features; `cond_proj` adds the projected w-embedding to its input."""

    def __init__(self, c_in: int, c_out: int, *, cond_dim: int | None = None, policy: Policy, rngs: nnx.Rngs) -> None:
        dtype = policy.compute
        self.linear_1 = nnx.Linear(c_in, c_out, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(c_out, c_out, dtype=dtype, rngs=rngs)
        if cond_dim:
            zeros = nnx.initializers.zeros_init()
            self.cond_proj = nnx.Linear(cond_dim, c_in, use_bias=False, dtype=jnp.float32, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, features: Float[Array, "b c"], condition: Float[Array, "b d"] | None = None
    ) -> Float[Array, "b e"]:
        if condition is not None:
            features = features + self.cond_proj(condition.astype(jnp.float32))
        return self.linear_2(jax.nn.silu(self.linear_1(features)))


class ResnetBlock2D(nnx.Module):
    """Residual block: norm, SiLU and convolution, twice, with the time embedding added between."""

    def __init__(
        self, c_in: int, c_out: int, *, time_dim: int | None, groups: int, eps: float, policy: Policy, rngs: nnx.Rngs
    ) -> None:
        dtype = policy.compute
        self.norm1 = GroupNorm(groups, c_in, eps, policy=policy)
        self.conv1 = conv(c_in, c_out, dtype=dtype, rngs=rngs)
        if time_dim:
            self.time_emb_proj = nnx.Linear(time_dim, c_out, dtype=dtype, rngs=rngs)
        self.norm2 = GroupNorm(groups, c_out, eps, policy=policy)
        self.conv2 = conv(c_out, c_out, dtype=dtype, rngs=rngs)
        if c_in != c_out:
            self.conv_shortcut = conv(c_in, c_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], time: Float[Array, "b e"] | None = None) -> Float[Array, "b h w d"]:
        y = self.conv1(self.norm1(x, silu=True))
        if time is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        y = self.conv2(self.norm2(y, silu=True))
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


def enlarge(x: Float[Array, "b h w c"], size: tuple[int, int] | None = None) -> Float[Array, "b h2 w2 c"]:
    """Upsamples by nearest neighbour to twice the size, or to `size`: 2h or 2h - 1 by 2w or 2w - 1.

    These are the sizes that a stride of 2 reduces to (h, w). For size 2h - 1, row i comes from row
    floor(i h / (2h - 1)) = floor(i / 2). So an odd size is the doubled map without its last row or column.
    """
    doubled = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return doubled if size is None else doubled[:, : size[0], : size[1]]
