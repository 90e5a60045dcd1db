"""Psi: one step of a solver along the probability-flow ODE, from t down to s.

psi(denoise, process, z_t, t, s) -> z_s, where denoise(z, t) -> (x0, eps) is guided already and t, s are (B,) vectors,
so that each sample takes a step of its own. h = lambda_s - lambda_t > 0. On the ODE z depends on t through lambda only,
and the exact solution is

    z_s = (alpha_s / alpha_t) z_t - alpha_s ∫ exp(-lambda) eps dlambda     (DPM-Solver, arXiv 2206.00927, prop. 3.1)
        = (sigma_s / sigma_t) z_t + sigma_s ∫ exp(lambda) x0 dlambda       (DPM-Solver++, arXiv 2211.01095, prop. 4.1)

with both integrals from lambda_t to lambda_s. A solver of second order takes eps or x0 from the middle of it.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.guidance import Denoise, Latent
from lcm_jax.diffusion.process import Process, Time
from lcm_jax.diffusion.schedule import alpha_sigma, combine
from lcm_jax.errors import UserError


def ddim(denoise: Denoise, process: Process, z_t: Latent, t: Time, s: Time) -> Latent:
    """DDIM (arXiv 2010.02502, eq. 12 with no noise), which is DPM-Solver-1: order 1, one call."""
    x0, eps = denoise(z_t, t)
    return combine(x0, eps, process.alpha(s), process.sigma(s))


def dpm(denoise: Denoise, process: Process, z_t: Latent, t: Time, s: Time) -> Latent:
    """DPM-Solver-2 (algorithm 1 there, with its midpoint r1 = 1/2): order 2 in eps, two calls.

    Raises:
      UserError: the schedule has zero terminal SNR: h is infinite there, and alpha_t, by which we divide, is 0.
    """
    if process.has_zero_terminal_snr:
        raise UserError(
            "the solver 'dpm' needs a positive terminal SNR, but the schedule has rescale_betas_zero_snr; use 'ddim' "
            "or 'dpmpp'"
        )
    h, _, eps = _midpoint(denoise, process, z_t, t, s)
    alpha_t, alpha_s, sigma_s = process.alpha(t), process.alpha(s), process.sigma(s)
    return combine(z_t, eps, alpha_s / alpha_t, -sigma_s * jnp.expm1(h))


def dpmpp(denoise: Denoise, process: Process, z_t: Latent, t: Time, s: Time) -> Latent:
    """DPM-Solver++(2S) (algorithm 1 there, with r1 = 1/2): order 2 in x0, two calls.

    At zero terminal SNR, where lambda is -infinity and (2S) has no midpoint, lambda is that of abar = 2^-24.
    """
    h, x0, _ = _midpoint(denoise, process, z_t, t, s)
    sigma_t, alpha_s, sigma_s = process.sigma(t), process.alpha(s), process.sigma(s)
    return combine(z_t, x0, sigma_s / sigma_t, -alpha_s * jnp.expm1(-h))


def _midpoint(
    denoise: Denoise, process: Process, z_t: Latent, t: Time, s: Time
) -> tuple[Float[Array, " b"], Latent, Latent]:
    """Returns h, and (x0, eps) at the middle in lambda, which a step of first order leads to."""
    lambda_t, lambda_s = process.log_snr(t), process.log_snr(s)
    lambda_m = (lambda_t + lambda_s) / 2
    u = combine(*denoise(z_t, t), *alpha_sigma(lambda_m))
    return lambda_s - lambda_t, *denoise(u, process.time_of(lambda_m))


SOLVERS: dict[str, Callable[[Denoise, Process, Latent, Time, Time], Latent]] = {
    "ddim": ddim,
    "dpm": dpm,
    "dpmpp": dpmpp,
}
