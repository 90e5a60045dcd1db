"""Samples of a run while it trains: always the same prompts and noise, from keys that training never uses."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.config import Config
from lcm_jax.data.batches import batches
from lcm_jax.diffusion.guidance import is_guided
from lcm_jax.diffusion.sampling import lcm_timesteps, trailing_timesteps
from lcm_jax.families.base import Tokens, default_sizes
from lcm_jax.host.images import grid, to_signed, to_uint8, to_unit
from lcm_jax.inference.generate import Sampler, generate
from lcm_jax.training.networks import Parts, components_of

Preview = Callable[[dict, dict], np.ndarray]
SEED = 0
LEAST = 128  # pixels; smaller images are enlarged on the sheet
LINES = 3  # of a label


def sheet(config: Config, parts: Parts, images: np.ndarray, step: int) -> np.ndarray:
    """Returns the preview of a step to look at, uint8 (H, W, 3): enlarged, each image above its prompt."""
    if parts.objective.sampling(parts.options, parts.process) is None:
        labels = ["image", "reconstruction"] * (len(images) // 2)
        how = "images and what the autoencoder makes of them"
    else:
        labels = list(config.log.prompts) or [""]
        how = f"{config.log.sample_steps} network steps, guidance scale {config.log.guidance_scale:g}"
    return grid(
        images,
        columns=4,
        scale=-(-LEAST // min(LEAST, *images.shape[1:3])),
        labels=labels,
        lines=LINES,
        title=f"step {step} of {config.steps}; {how}",
    )


def make_preview(config: Config, parts: Parts, tokenizer: Callable[[list[str]], Tokens]) -> Preview:
    """Returns `preview(weights, frozen) -> uint8 (N, H, W, 3)`; `weights` are the EMA or the trained weights.

    A denoiser samples `config.log.prompts` in `sample_steps` steps, as its objective says. An autoencoder shows
    training images, each followed by its reconstruction.
    """
    how = parts.objective.sampling(parts.options, parts.process)
    if how is None:
        images = next(batches(config.data, tokenize=tokenizer, batch_size=8, seed=SEED))["image"]
        vae = parts.networks["vae"]

        @jax.jit
        def reconstruct(params: dict) -> jax.Array:
            latents = vae.apply(params, to_signed(images), None, method="to_latents")
            return vae.apply(params, latents, method="to_images")

        def preview(weights: dict, frozen: dict) -> np.ndarray:
            decoded = to_uint8(to_unit(np.asarray(reconstruct(weights["vae"]))))
            return np.stack([images, decoded], axis=1).reshape(-1, *images.shape[1:])

        return preview
    family = parts.family
    sampler = Sampler(
        family=family,
        networks={name: parts.networks[name] for name in components_of(family)},
        process=parts.process,
        kind=how.kind,
        guided=is_guided(config.log.guidance_scale, family.w_embedding_dim(parts.networks[family.denoiser].config)),
        timestep_scaling=how.timestep_scaling,
    )
    if how.grid_steps:
        timesteps = lcm_timesteps(config.log.sample_steps, parts.process, how.grid_steps)
    else:
        timesteps = trailing_timesteps(config.log.sample_steps, parts.process.num_train_timesteps)
    times = jnp.asarray(timesteps)
    prompts = list(config.log.prompts) or [""]
    ids = jax.tree.map(jnp.asarray, tokenizer(prompts))
    null_ids = jax.tree.map(lambda of: jnp.repeat(of, len(prompts), 0), parts.null_ids)
    side = config.data.image_size
    sizes = jnp.asarray(default_sizes(len(prompts), side, side)) if family.uses_sizes else None
    w = jnp.full(len(prompts), config.log.guidance_scale - 1.0, jnp.float32)
    shape = parts.latent_shape(config.data.image_size)
    key_z, key_noise = jax.random.split(jax.random.key(SEED))
    z_T = jax.random.normal(key_z, (len(prompts), *shape))

    @jax.jit
    def sample(params: dict, frozen: dict) -> jax.Array:
        for name in sampler.networks.keys() & parts.adapted.keys():
            params = {**params, name: lora.merge(frozen[name], params[name], lora.alphas(parts.adapted[name]))}
        # the trained weights stand before the frozen ones of the same component
        return generate(sampler, {**frozen, **params}, ids, null_ids, sizes, sizes, w, times, z_T, key_noise)

    return lambda weights, frozen: to_uint8(to_unit(np.asarray(sample(weights, frozen))))
