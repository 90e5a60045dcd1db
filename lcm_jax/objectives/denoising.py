"""Plain diffusion training: DDPM's simple loss (arXiv 2006.11239, equation 14), with caption dropping and min-SNR."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError

Latents = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class DenoisingConfig:
    """The options of diffusion training. A wrong value raises UserError naming the field."""

    caption_dropping: float = 0.1  # share of the pictures trained with the empty prompt, for guidance
    min_snr_gamma: float = 0.0  # weight by min(SNR, gamma) (arXiv 2303.09556); 0: every timestep alike
    train_text_encoder: bool = False  # the text encoder too

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropping <= 1:
            raise UserError(f"caption_dropping is {self.caption_dropping}; it is a share, 0 to 1")
        if self.min_snr_gamma < 0:
            raise UserError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive, or 0 for none")


class Draws(NamedTuple):
    """What is random in a step, for the whole batch."""

    eps: Latents
    t: Int[Array, " b"]
    drop: Bool[Array, " b"]


def draw(key: jax.Array, shape: tuple[int, ...], config: DenoisingConfig, num_train_timesteps: int) -> Draws:
    """Draws for latents of this shape (b, h, w, c), float32."""
    key_eps, key_t, key_drop = jax.random.split(key, 3)
    return Draws(
        eps=jax.random.normal(key_eps, shape),
        t=jax.random.randint(key_t, shape[:1], 0, num_train_timesteps),
        drop=jax.random.bernoulli(key_drop, config.caption_dropping, shape[:1]),
    )


def denoising_loss(
    network: Callable[..., Latents],
    schedule: Schedule,
    z_0: Latents,
    context: Float[Array, "b l d"],
    null_context: Float[Array, "1 l d"],
    draws: Draws,
    config: DenoisingConfig,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Mean squared error of the network's prediction at a random timestep; network(z, t, context) -> output."""
    context = jnp.where(draws.drop[:, None, None], null_context, context)
    z_t = schedule.add_noise(z_0, draws.eps, draws.t)
    error = network(z_t, draws.t, context) - schedule.target(z_0, draws.eps, draws.t)
    loss = jnp.square(error).mean((1, 2, 3))
    if config.min_snr_gamma:
        loss = loss * min_snr_weight(schedule, draws.t, config.min_snr_gamma)
    return loss.mean(), {}


def min_snr_weight(schedule: Schedule, t: Int[Array, " b"], gamma: float) -> Float[Array, " b"]:
    """min(SNR, gamma) as a weight of the squared error in x0, converted to the network's own prediction.

    arXiv 2303.09556, section 3.4: divided by SNR for epsilon, by SNR + 1 for v.
    """
    snr = jnp.square(schedule.alpha(t) / schedule.sigma(t))
    clipped = jnp.minimum(snr, gamma)
    if schedule.prediction_type == "sample":
        return clipped
    if schedule.prediction_type == "v_prediction":
        return clipped / (snr + 1)
    return clipped / snr
