"""The autoencoder of latent diffusion (arXiv 2112.10752, equation 25 without its adversarial part): L1 and KL."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """The options of autoencoder training. A wrong value raises UserError naming the field."""

    kl_weight: float = 1e-6  # of KL(q(z|x) || N(0, 1)), summed over a picture, against the mean absolute error

    def __post_init__(self) -> None:
        if self.kl_weight < 0:
            raise UserError(f"kl_weight is {self.kl_weight}; it can't be negative")


def autoencoder_loss(
    encode: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    decode: Callable[[jax.Array], jax.Array],
    images: Float[Array, "b H W 3"],
    key: jax.Array,
    config: AutoencoderConfig,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """|x - D(z)| + kl_weight KL(q(z|x) || N(0, 1)), z drawn from q(z|x) = N(mean, exp(logvar)).

    Args: encode(images) -> (mean, logvar); decode(z) -> images; images in [-1, 1].
    Returns: the loss, and its parts with the deviation of z over the batch, whose inverse is `scaling_factor`.
    """
    mean, logvar = encode(images)
    z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    reconstruction = jnp.abs(decode(z) - images).mean()
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).sum((1, 2, 3)).mean()
    aux = {"reconstruction": reconstruction, "kl": kl, "latent_deviation": z.std()}
    return reconstruction + config.kl_weight * kl, aux
