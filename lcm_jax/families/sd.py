"""Stable Diffusion 1.x and 2.x, and latent consistency models of their shape.

The condition is the text encoder's features (B, L, D).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Float, Int

from lcm_jax.families.base import Family
from lcm_jax.interop import layouts
from lcm_jax.models import UNetConfig


def _encode(encoders: Mapping[str, Callable[..., jax.Array]], input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
    return encoders["text_encoder"](input_ids)


def _condition(text: Float[Array, "b l d"], sizes: Int[Array, "b 6"] | None) -> Float[Array, "b l d"]:
    return text


def _call(
    unet: Callable[..., jax.Array],
    z: Float[Array, "b h w c"],
    t: Array,
    condition: Float[Array, "b l d"],
    w_embedding: Array | None = None,
) -> Float[Array, "b h w c"]:
    return unet(z, t, condition) if w_embedding is None else unet(z, t, condition, w_embedding)


def _w_embedding_dim(config: UNetConfig) -> int:
    return config.time_cond_proj_dim or 0


def _with_w_embedding(config: UNetConfig, dim: int) -> UNetConfig:
    return dataclasses.replace(config, time_cond_proj_dim=dim or None)


SD = Family(
    name="Stable Diffusion",
    layout=layouts.SD,
    text_encoders=("text_encoder",),
    encode=_encode,
    condition=_condition,
    call=_call,
    w_embedding_dim=_w_embedding_dim,
    with_w_embedding=_with_w_embedding,
    w_projection="time_embedding.cond_proj.kernel",
)
