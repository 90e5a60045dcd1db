"""Classifier-free guidance: the mix of two predictions, how a student is told of it, and what it leads away from.

Everywhere w = guidance_scale - 1: no guidance is w = 0, guidance_scale 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lcm_jax.diffusion.process import Process, Time
from lcm_jax.diffusion.schedule import per_sample

Latent = Float[Array, "b *d"]
Condition = Any  # a tree of arrays whose first axis is the batch; only its family looks inside
Denoise = Callable[[Latent, Time], tuple[Latent, Latent]]  # (z, t (B,)) -> (x0, eps)


def guide(cond: Latent, uncond: Latent, w: Float[Array, " b"]) -> Latent:
    """(1 + w) cond - w uncond (LCM, arXiv 2310.04378, section 4.2); the weights sum to one, so outputs, eps and x0 mix
    alike."""
    w = per_sample(w, cond)
    return (1 + w) * cond - w * uncond


def is_guided(guidance_scale: float, w_embedding_dim: int | None) -> bool:
    """Returns whether each step mixes predictions with and without the prompt, by the same rule as diffusers.

    A guidance_scale up to 1 is no guidance: also 0 and negative values, which the formula would take for the empty
    prompt and beyond. A network with a w-embedding gets the guidance as an input instead.
    """
    return guidance_scale > 1 and not w_embedding_dim


def w_embedding(w: Float[Array, " b"], dim: int) -> Float[Array, "b {dim}"]:
    """What a student is told of w: [sin, cos] of 1000 w exp(-ln(1e4) i / (dim/2 - 1)), i = 0 … dim/2 - 1.

    Float32 to the end: rounding w to bfloat16 would shift an entry by up to 2. The frequencies are rounded as
    diffusers' LatentConsistencyModelPipeline rounds them.

    Args:
      w: guidance_scale - 1.
      dim: at least 4; an odd one ends in a zero.
    """
    half = dim // 2
    step = np.log(np.float32(10000.0)) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = (1000.0 * jnp.asarray(w, jnp.float32))[:, None] * frequencies
    embedding = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def cfg_denoiser(
    network: Callable[[Latent, Time, Condition], Latent],
    process: Process,
    condition: Condition,
    null_condition: Condition,
    w: Float[Array, " b"],
) -> Denoise:
    """Returns denoise(z, t (B,)) -> guided (x0, eps), which calls the network once, on 2B.

    Args:
      network: (z, t, condition) -> its raw output.
      process: the noise process.
      condition: of the prompts; a tree of arrays (B, …).
      null_condition: of the empty or negative prompts; the same tree of arrays (B, …) or (1, …).
      w: guidance_scale - 1.
    """

    def interleaved(c: Array, null: Array) -> Array:
        # the two halves of a sample lie side by side, so that a batch sharded over devices stays where it is
        return jnp.stack([c, jnp.broadcast_to(null, c.shape)], axis=1).reshape(-1, *c.shape[1:])

    both = jax.tree.map(interleaved, condition, null_condition)

    def denoise(z: Latent, t: Time) -> tuple[Latent, Latent]:
        output = network(jnp.repeat(z, 2, axis=0), jnp.repeat(t, 2, axis=0), both)
        output = output.reshape(-1, 2, *output.shape[1:])
        return process.to_x0_eps(guide(output[:, 0], output[:, 1], w), z, t)

    return denoise


def drop_condition(condition: Condition, null_condition: Condition, drop: Bool[Array, " b"]) -> Condition:
    """Replaces the conditions of the samples where `drop` is true by the null condition (arXiv 2207.12598, alg. 1)."""
    return jax.tree.map(lambda c, null: jnp.where(per_sample(drop, c), null, c), condition, null_condition)
