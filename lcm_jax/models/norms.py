"""Group and layer normalization with custom gradients that store only the input and a few statistics.

With automatic differentiation, a bfloat16 norm stores several float32 copies of its input for the backward pass, which
costs memory and bandwidth. Here the normalized values are recomputed instead.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcm_jax.models.policy import Policy


class GroupNorm(nnx.Module):
    """Group normalization over (H, W, C/groups) with float32 statistics, optionally followed by SiLU."""

    def __init__(self, groups: int, channels: int, eps: float, *, policy: Policy) -> None:
        self.groups, self.eps, self.policy = groups, eps, policy
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b *hw c"], *, silu: bool = False) -> Float[Array, "b *hw c"]:
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        y: Array = _group_norm(pixels, scale, bias, self.groups, self.eps, silu, self.policy.compute)
        return y.reshape(x.shape)


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis with float32 statistics."""

    def __init__(self, channels: int, eps: float, *, policy: Policy) -> None:
        self.eps, self.policy = eps, policy
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return _layer_norm(x, scale, bias, self.eps, self.policy.compute)


Kept = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _group_norm(x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool, dtype: Any) -> Array:
    return _group_norm_forward(x, scale, bias, groups, eps, silu, dtype)[0]


def _group_norm_forward(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool, dtype: Any
) -> tuple[Array, Kept]:
    """Subtracts the mean before squaring, since E[x²] - E[x]² loses precision if the mean is large."""
    pixels = x.astype(jnp.float32)
    mean = _over_groups(pixels.mean(1), groups)
    centred = pixels - mean
    rstd = jax.lax.rsqrt(_over_groups(jnp.square(centred).mean(1), groups) + eps)
    y = centred * (rstd * scale) + bias
    return (jax.nn.silu(y) if silu else y).astype(dtype), (x, scale, bias, mean, rstd)


def _group_norm_backward(groups: int, eps: float, silu: bool, dtype: Any, kept: Kept, dy: Array) -> Kept:
    x, scale, bias, mean, rstd = kept
    normal, dy = (x.astype(jnp.float32) - mean) * rstd, dy.astype(jnp.float32)
    if silu:
        y = normal * scale + bias
        gate = jax.nn.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    dbias, dscale = dy.sum(1), (dy * normal).sum(1)  # per sample
    by_mean, by_deviation = (_over_groups(d * scale / x.shape[1], groups) for d in (dbias, dscale))
    dx = rstd * (dy * scale - by_mean - normal * by_deviation)
    return dx.astype(x.dtype), dscale.sum(0), dbias.sum(0)


def _over_groups(channels: Float[Array, "b c"], groups: int) -> Float[Array, "b 1 c"]:
    """Returns the mean over each group's channels, repeated for each channel.

    Callers reduce the pixels per channel first. An array (…, groups, C/groups) of pixels would have a last axis of 10
    in SD 1.5, which is slow to reduce on CPU and padded to 128 on TPU.
    """
    b, c = channels.shape
    return jnp.repeat(channels.reshape(b, groups, c // groups).mean(-1), c // groups, axis=-1)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x: Array, scale: Array, bias: Array, eps: float, dtype: Any) -> Array:
    return _layer_norm_forward(x, scale, bias, eps, dtype)[0]


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float, dtype: Any) -> tuple[Array, Kept]:
    full = x.astype(jnp.float32)
    mean = full.mean(-1, keepdims=True)
    centred = full - mean
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (centred * (rstd * scale) + bias).astype(dtype), (x, scale, mean, rstd)


def _layer_norm_backward(eps: float, dtype: Any, kept: Kept, dy: Array) -> Kept:
    x, scale, mean, rstd = kept
    normal, dy = (x.astype(jnp.float32) - mean) * rstd, dy.astype(jnp.float32)
    dnormal = dy * scale
    by_mean = dnormal.mean(-1, keepdims=True)
    by_deviation = (dnormal * normal).mean(-1, keepdims=True)
    dx = rstd * (dnormal - by_mean - normal * by_deviation)
    return dx.astype(x.dtype), (dy * normal).sum((0, 1)), dy.sum((0, 1))


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)
_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
