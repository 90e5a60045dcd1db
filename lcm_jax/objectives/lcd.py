"""Latent consistency distillation (LCM, arXiv 2310.04378, algorithm 1).

The student's consistency function f at t and its target's at s, one solver step down the guided teacher's ODE, shall
agree. k timesteps lie between the two (section 4.3), and w is drawn anew for each sample (section 4.2).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.distances import DISTANCES
from lcm_jax.diffusion.guidance import cfg_denoiser, drop_condition, w_embedding
from lcm_jax.diffusion.sampling import lcm_grid
from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.diffusion.solvers import SOLVERS
from lcm_jax.errors import UserError, one_of

Latent = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class LCDConfig:
    """How a consistency model is distilled. guidance_scale = w + 1, as a user of the model sees it."""

    skip: int = 20  # k, the training timesteps that one step of psi crosses
    solver: str = "ddim"  # psi: ddim | dpm (DPM-Solver-2) | dpmpp (DPM-Solver++(2S)); the latter two call twice
    guidance_min: float = 3.0
    guidance_max: float = 15.0
    distance: str = "huber"  # huber | l2
    huber_c: float = 1e-3
    timestep_scaling: float = 10.0  # of the boundary condition
    empty_prompts: float = 0.0  # the share of samples that are distilled under the empty prompt
    w_embedding_dim: int = 256  # 0: the student isn't told w, and draws with the average guidance
    w_embedding_init: str = "zeros"  # zeros (the student starts as the teacher, for every w) | random

    def __post_init__(self) -> None:
        one_of("solver", self.solver, SOLVERS)
        one_of("distance", self.distance, DISTANCES)
        one_of("w_embedding_init", self.w_embedding_init, ("zeros", "random"))
        if self.skip < 1:
            raise UserError(f"skip is {self.skip}; it must be at least 1")
        if not self.guidance_min >= 1:
            raise UserError(f"guidance_min is {self.guidance_min}; it must be at least 1, which is no guidance")
        if not self.guidance_min <= self.guidance_max < float("inf"):
            raise UserError(f"guidance_max is {self.guidance_max}; it can't be below guidance_min {self.guidance_min}")
        for name in ("huber_c", "timestep_scaling"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.empty_prompts < 1:
            raise UserError(f"empty_prompts is {self.empty_prompts}; it must be in [0, 1)")
        if self.w_embedding_dim != 0 and (self.w_embedding_dim < 4 or self.w_embedding_dim % 2):
            raise UserError(f"w_embedding_dim is {self.w_embedding_dim}; it must be 0, or even and at least 4")
        if self.distance != "huber" and self.huber_c != LCDConfig.huber_c:
            raise UserError(f"huber_c has no effect: distance is {self.distance!r}")
        if self.w_embedding_dim == 0 and self.w_embedding_init != LCDConfig.w_embedding_init:
            raise UserError("w_embedding_init has no effect: w_embedding_dim is 0")

    def solver_steps(self, num_train_timesteps: int) -> int:
        """Returns N, the steps of the trained grid.

        Raises:
          UserError: T // N is not `skip` again, so that a sampler, which is told N only, would take another grid.
        """
        N = num_train_timesteps // self.skip
        if N < 1:
            raise UserError(f"skip is {self.skip}; the schedule has only {num_train_timesteps} timesteps")
        if (nearest := num_train_timesteps // N) != self.skip:
            raise UserError(
                f"skip is {self.skip}: its {N} steps are {nearest} timesteps apart to a sampler; take skip={nearest}"
            )
        return N


class Draws(NamedTuple):
    """All that is random in the loss."""

    eps: Latent  # standard normal
    i: Int[Array, " b"]  # in 0 … N-1; t = (i + 1) k - 1
    w: Float[Array, " b"]  # guidance_scale - 1
    drop: Bool[Array, " b"]  # whether the prompt is replaced by the empty one


def draw(key: jax.Array, shape: tuple[int, ...], config: LCDConfig, num_train_timesteps: int) -> Draws:
    """Draws for latents of this shape (B, h, w, C); float32."""
    key_eps, key_i, key_w, key_drop = jax.random.split(key, 4)
    batch = shape[:1]
    return Draws(
        eps=jax.random.normal(key_eps, shape),
        i=jax.random.randint(key_i, batch, 0, config.solver_steps(num_train_timesteps)),
        w=jax.random.uniform(key_w, batch, minval=config.guidance_min - 1, maxval=config.guidance_max - 1),
        drop=jax.random.bernoulli(key_drop, config.empty_prompts, batch),
    )


def lcd_loss(
    student: Callable[..., Latent],
    target: Callable[..., Latent],
    teacher: Callable[..., Latent],
    schedule: Schedule,
    z_0: Latent,
    context: Float[Array, "b l d"],
    null_context: Float[Array, "#b l d"],
    draws: Draws,
    config: LCDConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """d(f_theta(z_t, w, c, t), f_theta-(z_s, w, c, s)), with z_s one step of psi from z_t.

    Args:
      student, target: (z, t, context, w embedding or None) -> raw output, of the weights theta that are trained, and of
        theta-, their average. No gradient flows into the target.
      teacher: (z, t, context) -> raw output; called on 2B.
      schedule: the teacher's.
      z_0: float32 latents, scaled.
      context, null_context: of the captions, and of the empty prompt (one for all, or one each).
      draws: from `draw`.

    Returns:
      The loss, and {"mean_square": of the difference of the two values of f, whatever the distance is}.
    """
    eps, i, w, drop = draws
    T, k = schedule.num_train_timesteps, config.skip
    t = jnp.asarray(lcm_grid(config.solver_steps(T), T))[i]  # t_{n+k}
    s = jnp.maximum(t - k, 0)  # t_n
    c = drop_condition(context, null_context, drop)
    w_emb = w_embedding(w, config.w_embedding_dim) if config.w_embedding_dim else None

    z_t = schedule.add_noise(z_0, eps, t)
    denoise = cfg_denoiser(teacher, schedule, c, null_context, w)
    z_s = SOLVERS[config.solver](denoise, schedule, z_t, t, s)

    def f(network: Callable[..., Latent], z: Latent, t: Int[Array, " b"]) -> Latent:
        return consistency_function(schedule, network(z, t, c, w_emb), z, t, config.timestep_scaling)

    difference = f(student, z_t, t) - jax.lax.stop_gradient(f(target, z_s, s))
    loss = DISTANCES[config.distance](difference, config.huber_c)
    return loss, {"mean_square": jnp.mean(difference**2)}


def summary(aux: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """What is logged, of the means over the whole batch: {"rms_difference"}."""
    return {"rms_difference": jnp.sqrt(aux["mean_square"])}
