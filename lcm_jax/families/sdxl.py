"""Stable Diffusion XL, latent consistency models of its shape, and its small relatives (SSD-1B, Segmind-Vega, KOALA).

The text is {"context": (B, L, D), "pooled": (B, P)}: the penultimate features of both text encoders side by side, and
the second encoder's projected text embedding. The condition adds {"time_ids": (B, 6)}, float32: the sizes of the image.
A distilled model differs by its LCMScheduler and the UNet's `time_cond_proj_dim`, not by its pipeline class.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcm_jax.families.sd import SD
from lcm_jax.interop import layouts


def _encode(encoders: Mapping[str, Callable[..., Any]], tokens: Mapping[str, Int[Array, "b l"]]) -> dict[str, Array]:
    first, _ = encoders["text_encoder"](tokens["tokenizer"], method="hidden_states")
    second, pooled = encoders["text_encoder_2"](tokens["tokenizer_2"], method="hidden_states")
    return {"context": jnp.concatenate([first[-2], second[-2]], axis=-1), "pooled": pooled}


def _condition(text: dict[str, Array], sizes: Int[Array, "b 6"]) -> dict[str, Array]:
    return {**text, "time_ids": sizes.astype(jnp.float32)}  # bfloat16 would turn 1023 into 1024


def _null(text: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda features: jnp.zeros_like(features[:1]), text)


def _call(
    unet: Callable[..., jax.Array],
    z: Float[Array, "b h w c"],
    t: Array,
    condition: dict[str, Array],
    w_embedding: Array | None = None,
) -> Float[Array, "b h w c"]:
    added = {"text_embeds": condition["pooled"], "time_ids": condition["time_ids"]}
    return unet(z, t, condition["context"], w_embedding, added)


SDXL = dataclasses.replace(
    SD,
    name="Stable Diffusion XL",
    layout=layouts.SDXL,
    text_encoders=("text_encoder", "text_encoder_2"),
    encode=_encode,
    condition=_condition,
    call=_call,
    null=_null,
    null_setting="force_zeros_for_empty_prompt",
    uses_sizes=True,
    guidance=5.0,
    student_guidance=5.0,
    strength=0.3,
)
