"""Latent consistency distillation (LCM, arXiv 2310.04378, algorithm 1).

The student's consistency function f at t and its target's at s, one solver step down the guided teacher's ODE, shall
agree. k timesteps lie between the two (section 4.3), and w is drawn anew for each sample (section 4.2).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.distances import DISTANCES
from lcm_jax.diffusion.guidance import Condition, cfg_denoiser, drop_condition, w_embedding
from lcm_jax.diffusion.process import Process
from lcm_jax.diffusion.solvers import SOLVERS
from lcm_jax.errors import UserError, one_of
from lcm_jax.objectives.base import Inputs, Networks, Objective, Roles, Sampling, Update

Latent = Float[Array, "b h w c"]


@dataclasses.dataclass(frozen=True)
class LCDConfig:
    """How a consistency model is distilled. guidance_scale = w + 1, as a user of the model sees it."""

    skip: int = 20  # k, the training timesteps that one step of psi crosses
    solver: str = "ddim"  # psi: ddim | dpm (DPM-Solver-2) | dpmpp (DPM-Solver++(2S)); the latter two call twice
    guidance_min: float = 3.0  # each sample is distilled with a guidance_scale from this range, uniformly
    guidance_max: float = 15.0
    distance: str = "huber"  # between f and its target: huber (pseudo-Huber) | l2
    huber_c: float = 1e-3  # c of the pseudo-Huber distance
    timestep_scaling: float = 10.0  # of the boundary condition
    empty_prompts: float = 0.0  # the share of samples that are distilled under the empty prompt
    w_embedding_dim: int = (
        256  # width of the embedding of w; 0: no input for w, the student learns the mean over the guidance range
    )
    w_embedding_init: str = "zeros"  # zeros (the student starts as the teacher, for every w) | random

    def __post_init__(self) -> None:
        one_of("solver", self.solver, SOLVERS)
        one_of("distance", self.distance, DISTANCES)
        one_of("w_embedding_init", self.w_embedding_init, ("zeros", "random"))
        if self.skip < 1:
            raise UserError(f"skip is {self.skip}; it must be at least 1")
        if not self.guidance_min >= 1:
            raise UserError(f"guidance_min is {self.guidance_min}; it must be at least 1 (no guidance)")
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
                f"skip is {self.skip}, but a sampler's {N} steps are {nearest} timesteps apart; use skip={nearest}"
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
    process: Process,
    z_0: Latent,
    condition: Condition,
    null_condition: Condition,
    draws: Draws,
    config: LCDConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """d(f_theta(z_t, w, c, t), f_theta-(z_s, w, c, s)), with z_s one step of psi from z_t.

    Args:
      student, target: (z, t, condition, w embedding or None) -> raw output, of the weights theta that are trained, and
        of theta-, their average. No gradient flows into the target.
      teacher: (z, t, condition) -> raw output; called on 2B.
      process: the noise process of the teacher.
      z_0: float32 latents, scaled.
      condition, null_condition: of the captions, and of the empty prompt (one for all, or one each); trees of arrays.
      draws: from `draw`.

    Returns:
      The loss, and {"mean_square": of the difference of the two values of f, whatever the distance is}.
    """
    eps, i, w, drop = draws
    T, k = process.num_train_timesteps, config.skip
    t = jnp.asarray(process.grid(config.solver_steps(T)))[i]  # t_{n+k}
    s = jnp.maximum(t - k, 0)  # t_n
    c = drop_condition(condition, null_condition, drop)
    w_emb = w_embedding(w, config.w_embedding_dim) if config.w_embedding_dim else None

    z_t = process.add_noise(z_0, eps, t)
    denoise = cfg_denoiser(teacher, process, c, null_condition, w)
    z_s = SOLVERS[config.solver](denoise, process, z_t, t, s)

    def f(network: Callable[..., Latent], z: Latent, t: Int[Array, " b"]) -> Latent:
        return consistency_function(process, network(z, t, c, w_emb), z, t, config.timestep_scaling)

    difference = f(student, z_t, t) - jax.lax.stop_gradient(f(target, z_s, s))
    loss = DISTANCES[config.distance](difference, config.huber_c)
    return loss, {"mean_square": jnp.mean(difference**2)}


def summary(aux: dict[str, Float[Array, ""]]) -> dict[str, Float[Array, ""]]:
    """What is logged, of the means over the whole batch: {"rms_difference"}."""
    return {"rms_difference": jnp.sqrt(aux["mean_square"])}


# ---- the record


def _roles(config: LCDConfig, family: Any) -> Roles:
    denoiser = family.denoiser
    return Roles(trained={"student": denoiser}, frozen={"teacher": denoiser}, exported={"student": denoiser})


def _updates(config: LCDConfig, process: Process) -> dict[str, Update]:
    def loss(networks: Networks, inputs: Inputs, draws: Draws) -> tuple[jax.Array, dict[str, jax.Array]]:
        return lcd_loss(
            student=networks.by_role["student"],
            target=networks.average["student"],
            teacher=networks.by_role["teacher"],
            process=process,
            z_0=inputs.z_0,
            condition=inputs.condition,
            null_condition=inputs.null_condition,
            draws=draws,
            config=config,
        )

    draws = functools.partial(draw, config=config, num_train_timesteps=process.num_train_timesteps)
    return {"student": Update(draws, loss, summary)}


def _check(config: LCDConfig, adapters: bool) -> None:
    if adapters and config.w_embedding_dim:
        raise UserError(
            f"lcd.w_embedding_dim is {config.w_embedding_dim}; with lora.rank it must be 0: a LoRA file can't store "
            "the projection of the w-embedding"
        )


def _network_config(role: str, config: LCDConfig, component: Any, family: Any) -> Any:
    if dim := family.w_embedding_dim(component):
        raise UserError(
            f"its {family.denoiser} takes a w-embedding of {dim}, so it is already a consistency model; set "
            "config.model.folder to a diffusion model"
        )
    return family.with_w_embedding(component, config.w_embedding_dim) if role == "student" else component


def _new_weight(config: LCDConfig, key: jax.Array, shape: tuple[int, ...]) -> Any:
    """The projection of the w-embedding: zero, so that the student starts as the teacher for every w, or random."""
    if config.w_embedding_init == "zeros":
        return np.zeros(shape, np.float32)
    return jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)


def _sampling(config: LCDConfig, process: Process) -> Sampling:
    return Sampling("lcm", config.solver_steps(process.num_train_timesteps), config.timestep_scaling)


def _recipe(config: LCDConfig, process: Process) -> dict[str, Any]:
    return {
        "method": "latent consistency distillation ([arXiv:2310.04378](https://arxiv.org/abs/2310.04378))",
        "guidance_min": config.guidance_min,
        "guidance_max": config.guidance_max,
        "original_inference_steps": config.solver_steps(process.num_train_timesteps),
        "timestep_scaling": config.timestep_scaling,
        "w_embedding_dim": config.w_embedding_dim,
        "options": {"solver": config.solver, "skip": config.skip, "distance": config.distance},
    }


LCD = Objective(
    name="lcd",
    options=LCDConfig,
    needs=frozenset({"latents", "condition"}),
    result="lcm",
    roles=_roles,
    updates=_updates,
    check=_check,
    network_config=_network_config,
    new_weight=_new_weight,
    sampling=_sampling,
    recipe=_recipe,
)
