"""psi, one step of the teacher's PF-ODE from z_t to z_s: `psi(denoise, schedule, z_t, t, s) -> z_s`.

`denoise(z, t) -> (x0, eps)` is the guided teacher; t and s are (b,), t > s, one a sample; s = 0 has abar_0, not 1.
The second-order solvers call the teacher again in the middle of the log-SNR; from pure noise (zero terminal SNR),
where there is no such middle, they take DDIM's step, which is their own first-order part.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from lcm_jax.diffusion.guidance import Denoise
from lcm_jax.diffusion.schedule import Schedule, column

Latents = Float[Array, "b h w c"]
Times = Num[Array, " b"]


def ddim(denoise: Denoise, schedule: Schedule, z_t: Latents, t: Times, s: Times) -> Latents:
    """DDIM (arXiv 2010.02502, equation 12, eta = 0): z_s = alpha_s x0 + sigma_s eps. First order."""
    x0, eps = denoise(z_t, t)
    return column(schedule.alpha(s), z_t) * x0 + column(schedule.sigma(s), z_t) * eps


def dpm_solver_2(denoise: Denoise, schedule: Schedule, z_t: Latents, t: Times, s: Times) -> Latents:
    """DPM-Solver-2 (arXiv 2206.00927, Algorithm 1, r1 = 1/2), in eps. Second order in h = lambda_s - lambda_t."""
    mid = _Middle(schedule, z_t, t, s)
    x0, eps = denoise(z_t, t)
    u = mid.alpha_m / mid.alpha_t * z_t - mid.sigma_m * jnp.expm1(mid.h / 2) * eps
    _, eps_m = denoise(u, mid.time)
    z_s = mid.alpha_s / mid.alpha_t * z_t - mid.sigma_s * jnp.expm1(mid.h) * eps_m
    return jnp.where(mid.none, mid.alpha_s * x0 + mid.sigma_s * eps, z_s)


def dpm_solver_pp_2s(denoise: Denoise, schedule: Schedule, z_t: Latents, t: Times, s: Times) -> Latents:
    """DPM-Solver++(2S) (arXiv 2211.01095, Algorithm 1, r = 1/2), in x0. Second order in h = lambda_s - lambda_t."""
    mid = _Middle(schedule, z_t, t, s)
    x0, eps = denoise(z_t, t)
    u = mid.sigma_m / mid.sigma_t * z_t - mid.alpha_m * jnp.expm1(-mid.h / 2) * x0
    x0_m, _ = denoise(u, mid.time)
    z_s = mid.sigma_s / mid.sigma_t * z_t - mid.alpha_s * jnp.expm1(-mid.h) * x0_m
    return jnp.where(mid.none, mid.alpha_s * x0 + mid.sigma_s * eps, z_s)


class _Middle:
    """The quantities of a step whose second call is at the middle of the log-SNR; (b, 1, 1, 1) but for `time` (b,)."""

    def __init__(self, schedule: Schedule, z: jax.Array, t: jax.Array, s: jax.Array) -> None:
        self.none = column(schedule.alpha(t) == 0, z)
        lambda_t, lambda_s = schedule.log_snr(t), schedule.log_snr(s)
        lambda_m = (lambda_t + lambda_s) / 2
        self.time = schedule.time_of(lambda_m)
        self.h = column(lambda_s - lambda_t, z)
        # alpha and sigma follow from lambda in closed form, since alpha^2 + sigma^2 = 1
        self.alpha_m = column(jnp.sqrt(jax.nn.sigmoid(2 * lambda_m)), z)
        self.sigma_m = column(jnp.sqrt(jax.nn.sigmoid(-2 * lambda_m)), z)
        self.alpha_t, self.sigma_t = column(schedule.alpha(t), z), column(schedule.sigma(t), z)
        self.alpha_s, self.sigma_s = column(schedule.alpha(s), z), column(schedule.sigma(s), z)


SOLVERS: dict[str, Callable[..., jax.Array]] = {
    "ddim": ddim,
    "dpm": dpm_solver_2,
    "dpmpp": dpm_solver_pp_2s,
}
