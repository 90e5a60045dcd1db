"""Latent consistency distillation: Algorithm 1 of the LCM paper (arXiv 2310.04378), one loss."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.guidance import cfg_denoiser, w_embedding
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.diffusion.solvers import SOLVERS
from lcm_jax.errors import UserError, one_of

Latents = Float[Array, "b h w c"]
Text = Float[Array, "b l d"]
Network = Callable[..., Latents]


@dataclasses.dataclass(frozen=True)
class LCDConfig:
    """The options of distillation. A wrong value raises UserError naming the field."""

    skip: int = 20  # k: how many of the schedule's timesteps one solver step goes over; N = T // k
    solver: str = "ddim"  # psi: ddim | dpm (DPM-Solver-2) | dpmpp (DPM-Solver++(2S))
    guidance_min: float = 3.0  # guidance_scale = w + 1 is drawn evenly from this range
    guidance_max: float = 15.0
    distance: str = "huber"  # d: huber (pseudo-Huber) | l2 (squared)
    huber_c: float = 1e-3
    timestep_scaling: float = 10.0  # of the boundary condition: how soon c_skip vanishes
    empty_prompts: float = 0.0  # share of the pictures whose prompt is replaced by the empty one
    w_embedding_dim: int = 256  # width of the guidance's embedding; 0: the student is not told w
    w_embedding_init: str = "zeros"  # of its projection: zeros (the student starts as the teacher) | random

    def __post_init__(self) -> None:
        if self.skip < 1:
            raise UserError(f"skip is {self.skip}; it must be at least 1")
        one_of("solver", self.solver, SOLVERS)
        one_of("distance", self.distance, DISTANCES)
        one_of("w_embedding_init", self.w_embedding_init, ("zeros", "random"))
        if not 1 <= self.guidance_min <= self.guidance_max:
            raise UserError(
                f"guidance_min is {self.guidance_min} and guidance_max {self.guidance_max}; "
                "1 <= guidance_min <= guidance_max would be right (1 is no guidance)"
            )
        for name in ("huber_c", "timestep_scaling"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.empty_prompts <= 1:
            raise UserError(f"empty_prompts is {self.empty_prompts}; it is a share, 0 to 1")
        if self.w_embedding_dim < 0 or self.w_embedding_dim % 2 or self.w_embedding_dim == 2:
            raise UserError(
                f"w_embedding_dim is {self.w_embedding_dim}; it must be an even number from 4, or 0 for none"
            )


class Draws(NamedTuple):
    """What is random in a step, for the whole batch: noise, the grid's index, guidance, and whose prompt is dropped."""

    eps: Latents
    i: Int[Array, " b"]
    w: Float[Array, " b"]
    drop: Bool[Array, " b"]


def draw(key: jax.Array, shape: tuple[int, ...], config: LCDConfig, num_train_timesteps: int) -> Draws:
    """Draws for latents of this shape (b, h, w, c), float32."""
    key_eps, key_i, key_w, key_drop = jax.random.split(key, 4)
    n = num_train_timesteps // config.skip
    return Draws(
        eps=jax.random.normal(key_eps, shape),
        i=jax.random.randint(key_i, shape[:1], 0, n),
        w=jax.random.uniform(key_w, shape[:1], minval=config.guidance_min - 1, maxval=config.guidance_max - 1),
        drop=jax.random.bernoulli(key_drop, config.empty_prompts, shape[:1]),
    )


def lcd_loss(
    student: Network,
    target: Network,
    teacher: Network,
    schedule: Schedule,
    z_0: Latents,
    context: Text,
    null_context: Float[Array, "1 l d"],
    draws: Draws,
    config: LCDConfig,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """LCM, Algorithm 1, from the noising to the loss.

    Args:
      student, target: f_theta's and f_theta-'s networks, (z, t, context, w_embedding or None) -> output.
      teacher: the diffusion model, (z, t, context) -> output.
      z_0: scaled latents of the pictures.
      context, null_context: text features of the prompts and of the empty prompt.

    Returns: the loss, float32, and {} (this loss has no parts).
    """
    k, psi, d = config.skip, SOLVERS[config.solver], DISTANCES[config.distance]
    context = jnp.where(draws.drop[:, None, None], null_context, context)

    t = (draws.i + 1) * k - 1  # t_{n+k}
    s = jnp.maximum(t - k, 0)  # t_n
    z_t = schedule.add_noise(z_0, draws.eps, t)

    # z^_{t_n} = z_{t_{n+k}} + (1 + w) Psi(z, c) - w Psi(z, null): one solver step of the guided teacher (equation 17)
    denoise = cfg_denoiser(teacher, schedule, context, null_context, draws.w)
    z_s = psi(denoise, schedule, z_t, t, s)

    e = w_embedding(draws.w, config.w_embedding_dim) if config.w_embedding_dim else None
    f = consistency_function(schedule, student(z_t, t, context, e), z_t, t, config.timestep_scaling)
    f_target = consistency_function(schedule, target(z_s, s, context, e), z_s, s, config.timestep_scaling)
    return d(f, jax.lax.stop_gradient(f_target), config.huber_c), {}


def l2(a: Latents, b: Latents, _: float) -> Float[Array, ""]:
    """Mean of (a - b)^2."""
    return jnp.square(a - b).mean()


def pseudo_huber(a: Latents, b: Latents, c: float) -> Float[Array, ""]:
    """Mean of sqrt((a - b)^2 + c^2) - c (arXiv 2310.14189, section 3.3, an element at a time)."""
    return (jnp.sqrt(jnp.square(a - b) + c**2) - c).mean()


DISTANCES: dict[str, Callable[[Latents, Latents, float], jax.Array]] = {"l2": l2, "huber": pseudo_huber}
