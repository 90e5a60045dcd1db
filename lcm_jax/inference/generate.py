"""Sampling from token ids to images as one pure function, which pipelines, previews and evaluation compile."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion import consistency, guidance, sampling
from lcm_jax.diffusion.process import Process
from lcm_jax.families import Family
from lcm_jax.families.base import Tokens
from lcm_jax.models import Flat, Network


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Static configuration of a sampling program; the arrays are arguments of `generate`.

    Attributes:
      family: of the networks.
      networks: by component of the folder.
      process: the noise process.
      kind: "lcm", "ddim", "dpmpp" or "euler".
      guided: whether each step applies classifier-free guidance, with and without the prompt. A denoiser
        with a w-embedding takes w as an input instead.
      timestep_scaling: for the consistency function's boundary condition; "lcm" only.
      decode: whether to return images, not latents.
      in_strips: whether to decode in strips (`models.strips`).
      negative: whether the null prompts are the caller's, not the family's null condition.
    """

    family: Family
    networks: Mapping[str, Network]
    process: Process
    kind: str
    guided: bool
    timestep_scaling: float = 10.0
    decode: bool = True
    negative: bool = False
    in_strips: bool = False


def generate(
    sampler: Sampler,
    params: dict[str, Flat],
    input_ids: Tokens,
    null_ids: Tokens,
    sizes: Int[Array, "b 6"] | None,
    null_sizes: Int[Array, "b 6"] | None,
    w: Float[Array, " b"],
    timesteps: Int[Array, " n"],
    z_T: Float[Array, "b h w c"],
    noise: Array,
) -> Float[Array, "b H W c"]:
    """Samples images from token ids. A pure function, which its callers jit.

    Args:
      sampler: static configuration.
      params: weights by component.
      input_ids: the prompts.
      null_ids: the negative or empty prompts; unused unless `sampler.guided`.
      sizes: of the images, as in `families.base.default_sizes`; None for a family that doesn't use them.
      null_sizes: the same for the negative or empty prompts.
      w: guidance_scale - 1.
      timesteps: descending, one per step.
      z_T: noise at the first timestep.
      noise: for "lcm", noise (n-1, b, h, w, c) to add between the steps, or a random key; unused otherwise.

    Returns:
      float32 images in [-1, 1] (not clipped), or latents.
    """
    family, networks, process = sampler.family, sampler.networks, sampler.process
    bound = {name: functools.partial(network.apply, params[name]) for name, network in networks.items()}
    denoiser = functools.partial(family.call, bound[family.denoiser])
    text = family.encode(bound, input_ids)
    condition = family.condition(text, sizes)

    if sampler.guided:
        null = family.null(text) if family.null and not sampler.negative else family.encode(bound, null_ids)
        denoise = guidance.cfg_denoiser(denoiser, process, condition, family.condition(null, null_sizes), w)
    else:
        dim = family.w_embedding_dim(networks[family.denoiser].config)
        w_embedding = guidance.w_embedding(w, dim) if dim else None

        def unguided(z: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return process.to_x0_eps(denoiser(z, t, condition, w_embedding), z, t)

        denoise = unguided

    if sampler.kind == "lcm":

        def f(z: jax.Array, t: jax.Array) -> jax.Array:
            x0, _ = denoise(z, t)
            return consistency.with_boundary(x0, z, t, sampler.timestep_scaling)

        z_0 = sampling.consistency_sample(f, process, z_T, timesteps, noise)
    elif sampler.kind in ("ddim", "euler"):
        z_0 = sampling.ddim_sample(denoise, process, z_T, timesteps, 1.0 if sampler.kind == "euler" else None)
    else:
        z_0 = sampling.dpmpp_sample(denoise, process, z_T, timesteps)
    return bound["vae"](z_0, method="to_images", in_strips=sampler.in_strips) if sampler.decode else z_0
