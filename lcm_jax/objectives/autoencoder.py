"""A variational autoencoder with a weak prior (arXiv 1312.6114; LDM, 2112.10752, section 3.1): reconstruction + KL."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.errors import UserError
from lcm_jax.objectives.base import Inputs, Networks, Objective, Roles, Update

Pixels = Float[Array, "b H W c"]
Latent = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """How an autoencoder is trained."""

    kl_weight: float = 1e-6  # of the KL divergence from the standard normal, both terms means over their elements
    latent_std: float = 1.0  # the standard deviation that scaled latents get (scaling_factor, written at export)

    def __post_init__(self) -> None:
        if not 0 <= self.kl_weight < float("inf"):
            raise UserError(f"kl_weight is {self.kl_weight}; it can't be negative")
        if not 0 < self.latent_std < float("inf"):
            raise UserError(f"latent_std is {self.latent_std}; it must be positive")


def autoencoder_loss(
    encode: Callable[[Pixels], tuple[Latent, Latent]],
    decode: Callable[[Latent], Pixels],
    images: Pixels,
    noise: Latent,
    config: AutoencoderConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean |decode(z) - x| of a draw z ~ q(z|x) = N(mean, exp(logvar)), plus kl_weight times the mean KL(q, N(0, 1)).

    Args:
      encode: images in [-1, 1] -> (mean, logvar), not scaled.
      decode: z -> images.
      images: in [-1, 1].
      noise: standard normal, for the draw.

    Returns:
      The loss, and its terms "reconstruction" and "kl" with the moments "latent_mean" and "latent_mean_square" of z.
      `deviation` of these two, each averaged over many batches, is what the VAE's scaling_factor is one over.
    """
    mean, logvar = encode(images)
    z = mean + jnp.exp(0.5 * logvar) * noise
    reconstruction = jnp.mean(jnp.abs(decode(z) - images))
    kl = 0.5 * jnp.mean(mean**2 + jnp.exp(logvar) - 1 - logvar)
    moments = {"latent_mean": jnp.mean(z), "latent_mean_square": jnp.mean(z**2)}
    return reconstruction + config.kl_weight * kl, {"reconstruction": reconstruction, "kl": kl, **moments}


def summary(aux: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """What is logged, of the means over the whole batch: they and "latent_deviation"."""
    return {**aux, "latent_deviation": deviation(aux["latent_mean"], aux["latent_mean_square"])}


def deviation(mean: Float[Array, ""], mean_square: Float[Array, ""]) -> Float[Array, ""]:
    """The standard deviation of values with this mean and mean square."""
    return jnp.sqrt(mean_square - mean**2)


# ---- the record


def _updates(config: AutoencoderConfig, process: Any) -> dict[str, Update]:
    def loss(networks: Networks, inputs: Inputs, noise: Latent) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = networks.by_role["vae"]
        return autoencoder_loss(
            encode=functools.partial(vae, method="encode"),
            decode=functools.partial(vae, method="decode"),
            images=inputs.images,
            noise=noise,
            config=config,
        )

    return {"vae": Update(jax.random.normal, loss, summary)}


def _check(config: AutoencoderConfig, adapters: bool) -> None:
    if adapters:
        raise UserError("lora.rank has no effect: objective is 'autoencoder', which LoRA files can't store")


AUTOENCODER = Objective(
    name="autoencoder",
    options=AutoencoderConfig,
    needs=frozenset({"images"}),
    result="model",
    roles=lambda config, family: Roles(trained={"vae": "vae"}, exported={"vae": "vae"}),
    updates=_updates,
    check=_check,
    latent_std=lambda config: config.latent_std,
)
