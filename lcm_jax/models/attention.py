"""Attention and transformer blocks of the UNet."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lcm_jax.models.blocks import run_layer
from lcm_jax.models.kernels.attend import Implementation, attend
from lcm_jax.models.layers import conv
from lcm_jax.models.norms import GroupNorm, LayerNorm
from lcm_jax.models.policy import Policy


class Attention(nnx.Module):
    """Multi-head attention: cross-attention if `context` is given, else self-attention."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        bias: bool,
        implementation: Implementation,
        policy: Policy,
        rngs: nnx.Rngs,
    ) -> None:
        inner, dtype = heads * head_dim, policy.compute
        self.heads = heads
        self.implementation: Implementation = implementation
        self.to_q = nnx.Linear(dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_k = nnx.Linear(context_dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_v = nnx.Linear(context_dim, inner, use_bias=bias, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(inner, dim, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m e"] | None = None) -> Float[Array, "b n d"]:
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = attend(q, k, v, self.implementation)
        return self.to_out[0](y.reshape(*y.shape[:2], -1))


class GEGLU(nnx.Module):
    """Computes x * gelu(gate), with the exact GELU."""

    def __init__(self, dim: int, inner: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        self.proj = nnx.Linear(dim, 2 * inner, dtype=policy.compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n e"]:
        return _gated(self.proj(x))


@jax.custom_vjp
def _gated(h: Array) -> Array:
    """Computes x * gelu(gate) of the two halves of h (B, N, 2E); the backward pass stores only h."""
    x, gate = jnp.split(h, 2, axis=-1)
    return x * jax.nn.gelu(gate, approximate=False)


def _gated_backward(h: Array, dy: Array) -> tuple[Array]:
    x, gate, dy = (y.astype(jnp.float32) for y in (*jnp.split(h, 2, axis=-1), dy))
    share = jax.scipy.special.ndtr(gate)  # gelu(g) = g · ndtr(g); the derivative of ndtr is the normal density
    density = jnp.exp(-0.5 * gate**2) / math.sqrt(2 * math.pi)
    return (jnp.concatenate([dy * gate * share, dy * x * (share + gate * density)], axis=-1).astype(h.dtype),)


_gated.defvjp(lambda h: (_gated(h), h), _gated_backward)


class FeedForward(nnx.Module):
    """GEGLU and a linear layer; the indices of `net` match the parameter names in diffusers files."""

    def __init__(self, dim: int, *, policy: Policy, rngs: nnx.Rngs) -> None:
        linear = nnx.Linear(4 * dim, dim, dtype=policy.compute, rngs=rngs)
        self.net = nnx.List([GEGLU(dim, 4 * dim, policy=policy, rngs=rngs), nnx.Module(), linear])

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.net[2](self.net[0](x))


class BasicTransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention and feed-forward, each with a residual connection."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        implementation: Implementation,
        policy: Policy,
        rngs: nnx.Rngs,
    ) -> None:
        options = {"bias": False, "implementation": implementation, "policy": policy, "rngs": rngs}
        self.norm1 = LayerNorm(dim, 1e-5, policy=policy)
        self.attn1 = Attention(dim, dim, heads, head_dim, **options)
        self.norm2 = LayerNorm(dim, 1e-5, policy=policy)
        self.attn2 = Attention(dim, context_dim, heads, head_dim, **options)
        self.norm3 = LayerNorm(dim, 1e-5, policy=policy)
        self.ff = FeedForward(dim, policy=policy, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"], context: Float[Array, "b m e"]) -> Float[Array, "b n d"]:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between two projections, with a residual connection."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        heads: int,
        depth: int,
        *,
        groups: int,
        linear: bool,
        implementation: Implementation,
        remat: str,
        policy: Policy,
        rngs: nnx.Rngs,
    ) -> None:
        dtype = policy.compute
        self.remat = remat
        self.norm = GroupNorm(groups, dim, 1e-6, policy=policy)
        project = nnx.Linear if linear else conv
        size = () if linear else (1,)
        self.proj_in = project(dim, dim, *size, dtype=dtype, rngs=rngs)
        self.transformer_blocks = nnx.List(
            BasicTransformerBlock(
                dim, context_dim, heads, dim // heads, implementation=implementation, policy=policy, rngs=rngs
            )
            for _ in range(depth)
        )
        self.proj_out = project(dim, dim, *size, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"], context: Float[Array, "b m e"]) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        y = run_layer(_project_norm, nnx.List([self.norm, self.proj_in]), x, remat=self.remat).reshape(b, h * w, c)
        for i, block in enumerate(self.transformer_blocks):
            with jax.named_scope(f"transformer_blocks.{i}"):
                y = run_layer(BasicTransformerBlock.__call__, block, y, context, remat=self.remat)
        return x + run_layer(type(self.proj_out).__call__, self.proj_out, y.reshape(b, h, w, c), remat=self.remat)


def _project_norm(layers: nnx.List, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    norm, project = layers
    return project(norm(x))
