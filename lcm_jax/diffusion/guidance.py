"""Classifier-free guidance (arXiv 2207.12598), and how a consistency model is told of it."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.schedule import Schedule, column

Denoise = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def guide(cond: Float[Array, "b ..."], uncond: Float[Array, "b ..."], w: Float[Array, " b"]) -> Float[Array, "b ..."]:
    """(1 + w) cond - w uncond (LCM, equation 12); guidance_scale is w + 1."""
    return cond + column(w, cond) * (cond - uncond)


def w_embedding(w: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
    """Sinusoids of 1000 w, [sin, cos], float32: the Fourier features of LCM, section 4.1, as diffusers computes them."""
    half = dim // 2
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / (half - 1))
    angle = 1000.0 * w.astype(jnp.float32)[:, None] * frequency
    embedding = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim - 2 * half)))


def interleave(a: Float[Array, "b ..."], b: Float[Array, "b ..."]) -> Float[Array, "b2 ..."]:
    """a0, b0, a1, b1, …: a batch of both that keeps the sharding of the batch."""
    return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])


def cfg_denoiser(
    network: Callable[..., jax.Array],
    schedule: Schedule,
    context: Float[Array, "b l d"],
    null_context: Float[Array, "#b l d"],
    w: Float[Array, " b"],
) -> Denoise:
    """Returns denoise(z, t) -> guided (x0, eps), by one network call on 2B.

    Args: network(z, t, context) -> output, as `schedule` reads it; text features of the prompts and of the empty
    prompt; guidance w >= 0.
    """
    both = interleave(context, jnp.broadcast_to(null_context, context.shape))

    def denoise(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        z2, t2 = interleave(z, z), interleave(t, t)
        x0, eps = schedule.to_x0_eps(network(z2, t2, both), z2, t2)
        return guide(x0[::2], x0[1::2], w), guide(eps[::2], eps[1::2], w)

    return denoise
