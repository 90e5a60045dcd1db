"""Prompts to pictures as one pure function: what pipelines, previews and evaluation compile."""

import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion import consistency, guidance, sampling
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.models import Flat, Network


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What a compiled sampling program is made for; arrays are given to `generate`.

    Attributes:
      networks: "unet", "vae", "text_encoder".
      schedule: the noise schedule.
      kind: "lcm", "ddim" or "dpmpp".
      guided: whether each step calls the UNet with and without the prompt and mixes the two. A UNet with a
        w-embedding is told the guidance instead, in one call.
      timestep_scaling: of the consistency function's boundary condition; "lcm" only.
      decode: whether the result are pictures, or latents.
    """

    networks: dict[str, Network]
    schedule: Schedule
    kind: str
    guided: bool
    timestep_scaling: float = 10.0
    decode: bool = True


def generate(
    sampler: Sampler,
    params: dict[str, Flat],
    input_ids: Int[Array, "b l"],
    null_ids: Int[Array, "b l"],
    w: Float[Array, " b"],
    timesteps: Int[Array, " n"],
    z_T: Float[Array, "b h w c"],
    noise: Array,
) -> Float[Array, "b H W c"]:
    """From token ids to pictures: a pure function, jitted as a whole by its callers.

    Args:
      sampler: static.
      params: weights by component.
      input_ids, null_ids: the prompts, and what guidance leads away from (the empty or the negative prompt; read only
        if `sampler.guided`).
      w: guidance, guidance_scale - 1.
      timesteps: falling; the length of this array is the number of steps.
      z_T: noise at the first timestep.
      noise: for "lcm": (n-1, b, h, w, c) to be added between the steps, or a key; not read otherwise.

    Returns:
      float32 pictures in [-1, 1] (not clipped), or latents.
    """
    networks, schedule = sampler.networks, sampler.schedule
    unet = functools.partial(networks["unet"].apply, params["unet"])
    context = networks["text_encoder"].apply(params["text_encoder"], input_ids)

    if sampler.guided:
        null_context = networks["text_encoder"].apply(params["text_encoder"], null_ids)
        denoise = guidance.cfg_denoiser(unet, schedule, context, null_context, w)
    else:
        dim = networks["unet"].config.time_cond_proj_dim
        w_embedding = guidance.w_embedding(w, dim) if dim else None

        def told(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return schedule.to_x0_eps(unet(z, t, context, w_embedding), z, t)

        denoise = told

    if sampler.kind == "lcm":

        def f(z: jax.Array, t: jax.Array) -> jax.Array:
            x0, _ = denoise(z, t)
            return consistency.with_boundary(x0, z, t, sampler.timestep_scaling)

        z_0 = sampling.consistency_sample(f, schedule, z_T, timesteps, noise)
    elif sampler.kind == "ddim":
        z_0 = sampling.ddim_sample(denoise, schedule, z_T, timesteps)
    else:
        z_0 = sampling.dpmpp_sample(denoise, schedule, z_T, timesteps)
    return networks["vae"].apply(params["vae"], z_0, method="to_images") if sampler.decode else z_0


def seed_key(seed: int) -> jax.Array:
    """Returns the random key of a seed in 0 … 2^64 - 1; no two seeds have the same.

    `jax.random.key` drops the upper half of a seed unless 64-bit numbers are enabled; seeds below 2^32 have the same
    key either way.
    """
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed))
