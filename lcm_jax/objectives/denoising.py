"""Plain diffusion training (DDPM, arXiv 2006.11239, eq. 14), for any prediction type, with classifier-free guidance."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.diffusion.guidance import Condition, drop_condition
from lcm_jax.diffusion.process import Process
from lcm_jax.diffusion.schedule import per_sample
from lcm_jax.errors import UserError
from lcm_jax.objectives.base import Inputs, Networks, Objective, Roles, Sampling, Update

Latent = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class DenoisingConfig:
    """How a diffusion model is trained."""

    caption_dropping: float = 0.1  # the share of captions that are replaced by the empty one, for guidance
    timestep_shift: float = 1.0  # above 1, more of the noisy timesteps are drawn; 1: all alike
    min_snr_gamma: float = 0.0  # weigh timesteps by min(SNR, gamma); 5 in the paper; 0: all alike
    train_text_encoder: bool = False  # jointly with the denoiser

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropping < 1:
            raise UserError(f"caption_dropping is {self.caption_dropping}; it must be in [0, 1)")
        if not 0 < self.timestep_shift < float("inf"):
            raise UserError(f"timestep_shift is {self.timestep_shift}; it must be positive")
        if not 0 <= self.min_snr_gamma < float("inf"):
            raise UserError(f"min_snr_gamma is {self.min_snr_gamma}; it must be positive, or 0 to turn it off")


class Draws(NamedTuple):
    """All that is random in the loss."""

    eps: Latent  # standard normal
    t: Int[Array, " b"]  # in 0 … T-1
    drop: Bool[Array, " b"]  # whether the caption is replaced by the empty one


def draw(key: jax.Array, shape: tuple[int, ...], config: DenoisingConfig, num_train_timesteps: int) -> Draws:
    """Draws for latents of this shape (B, h, w, C); float32.

    t / T is uniform, then shifted: a u / (1 + (a - 1) u) with a = timestep_shift (SD3, arXiv 2403.03206, eq. 23).
    """
    key_eps, key_t, key_drop = jax.random.split(key, 3)
    u, a, T = jax.random.uniform(key_t, shape[:1]), config.timestep_shift, num_train_timesteps
    t = (T * a * u / (1 + (a - 1) * u)).astype(jnp.int32)
    return Draws(
        eps=jax.random.normal(key_eps, shape),
        t=jnp.minimum(t, T - 1),  # u rounds up to 1
        drop=jax.random.bernoulli(key_drop, config.caption_dropping, shape[:1]),
    )


def min_snr_weight(process: Process, t: Int[Array, " b"], gamma: float) -> Float[Array, " b"]:
    """The weight of a squared error in the network's own output that weighs x0's by min(SNR, gamma).

    Min-SNR (arXiv 2303.09556): min(SNR, gamma) / SNR for eps, / (SNR + 1) for v.
    """
    snr = (process.alpha(t) / process.sigma(t)) ** 2
    per_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1.0}
    return jnp.minimum(snr, gamma) / per_x0[process.prediction_type]


def denoising_loss(
    network: Callable[..., Latent],
    process: Process,
    z_0: Latent,
    condition: Condition,
    null_condition: Condition,
    draws: Draws,
    config: DenoisingConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The mean squared error of the network's output at z_t.

    Args:
      network: (z, t, condition) -> raw output.
      process: the noise process.
      z_0: float32 latents, scaled.
      condition, null_condition: of the captions, and of the empty one (one for all, or one each); trees of arrays.
      draws: from `draw`.

    Returns:
      The loss, and {"mse": without weights}.
    """
    eps, t, drop = draws
    c = drop_condition(condition, null_condition, drop)
    z_t = process.add_noise(z_0, eps, t)
    square = (network(z_t, t, c) - process.target(z_0, eps, t)) ** 2
    weight = min_snr_weight(process, t, config.min_snr_gamma) if config.min_snr_gamma else jnp.ones(t.shape)
    return jnp.mean(per_sample(weight, square) * square), {"mse": jnp.mean(square)}


# ---- the record


def _roles(config: DenoisingConfig, family: Any) -> Roles:
    trained = {"denoiser": family.denoiser}
    if config.train_text_encoder:
        trained |= {name: name for name in family.text_encoders}
    return Roles(trained=trained, exported=trained)


def _updates(config: DenoisingConfig, process: Process) -> dict[str, Update]:
    def loss(networks: Networks, inputs: Inputs, draws: Draws) -> tuple[jax.Array, dict[str, jax.Array]]:
        return denoising_loss(
            networks.by_role["denoiser"],
            process=process,
            z_0=inputs.z_0,
            condition=inputs.condition,
            null_condition=inputs.null_condition,
            draws=draws,
            config=config,
        )

    draws = functools.partial(draw, config=config, num_train_timesteps=process.num_train_timesteps)
    return {"denoiser": Update(draws, loss)}


DENOISING = Objective(
    name="denoising",
    options=DenoisingConfig,
    needs=frozenset({"latents", "condition"}),
    result="model",
    roles=_roles,
    updates=_updates,
    sampling=lambda config, process: Sampling("ddim"),
)
