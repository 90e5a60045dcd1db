"""Sampling: grids of timesteps, and samplers that scan over one, so that compile time does not grow with steps."""

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcm_jax.diffusion.guidance import Denoise
from lcm_jax.diffusion.schedule import Schedule, column
from lcm_jax.errors import UserError

Latents = Float[Array, "b h w c"]
Timesteps = Int[Array, " n"]


def lcm_timesteps(
    steps: int, original_steps: int = 50, num_train_timesteps: int = 1000, strength: float = 1.0
) -> np.ndarray:
    """The timesteps of `steps` consistency steps, int32, falling, as diffusers' LCMScheduler takes them.

    From the training grid k-1, 2k-1, … (N = original_steps, k = T // N), reversed, every floor(j N / steps)-th. With
    `strength` below 1 (image to image) the grid ends at int(N strength).

    Raises: UserError if there are not that many points.
    """
    k = num_train_timesteps // original_steps
    grid = np.arange(1, int(original_steps * strength) + 1) * k - 1
    if not 1 <= steps <= len(grid):
        cut = f" x strength {strength:g}" if strength != 1.0 else ""
        raise UserError(f"steps is {steps}; it must be in 1..{len(grid)} (the {original_steps} solver steps{cut})")
    index = np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(int)
    return grid[::-1][index].astype(np.int32)


def trailing_timesteps(steps: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """Evenly spaced timesteps from T-1 downwards, int32 ("trailing" of arXiv 2305.08891, table 2)."""
    if not 1 <= steps <= num_train_timesteps:
        raise UserError(f"steps is {steps}; it must be in 1..{num_train_timesteps}")
    stops = np.arange(num_train_timesteps, 0, -num_train_timesteps / steps)[:steps]
    return (np.round(stops) - 1).astype(np.int32)


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int = 1000) -> np.ndarray:
    """Returns a user's own list as int32; raises UserError unless it falls strictly and lies within 0..T-1."""
    try:
        values = [operator.index(t) for t in timesteps]
    except TypeError:
        raise UserError(f"timesteps is {list(timesteps)}; it must be whole numbers") from None
    if not values:
        raise UserError("timesteps is empty; give at least one")
    for t in values:
        if not 0 <= t < num_train_timesteps:
            raise UserError(f"timesteps has {t}; it must lie in 0..{num_train_timesteps - 1}")
    if any(b >= a for a, b in zip(values, values[1:], strict=False)):
        raise UserError(f"timesteps is {values}; it must fall strictly, as in 999, 759, 499, 259")
    return np.asarray(values, np.int32)


def consistency_sample(
    f: Callable[[jax.Array, jax.Array], jax.Array],
    schedule: Schedule,
    z_T: Latents,
    timesteps: Timesteps,
    noise: Float[Array, "n_minus_1 b h w c"] | jax.Array,
) -> Latents:
    """Multistep consistency sampling (CM, Algorithm 1): predict x0, re-noise to the next timestep, …; no noise at last.

    Args:
      f: the consistency function f(z, t), t (b,).
      z_T: noise at the first timestep.
      timesteps: falling.
      noise: what is added between the steps, or a key, of which each step takes one.

    Returns: x0.
    """
    n = len(timesteps)
    keys = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
    # the last step re-noises to alpha = 1, sigma = 0, which is x0 itself: one body for all steps, compiled once
    alpha, sigma = _next_levels(schedule, timesteps, 1.0)
    if keys:
        between = jax.random.split(noise, n)
    else:
        between = jnp.concatenate([noise.astype(z_T.dtype), jnp.zeros((1, *z_T.shape), z_T.dtype)])

    def step(z: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, alpha_s, sigma_s, draw = inputs
        eps = jax.random.normal(draw, z.shape, z.dtype) if keys else draw
        x0 = f(z, jnp.full(z.shape[0], t))
        return alpha_s.astype(z.dtype) * x0 + sigma_s.astype(z.dtype) * eps, None

    return jax.lax.scan(step, z_T, (jnp.asarray(timesteps), alpha, sigma, between))[0]


def ddim_sample(denoise: Denoise, schedule: Schedule, z_T: Latents, timesteps: Timesteps) -> Latents:
    """DDIM (arXiv 2010.02502, equation 12, eta = 0) over falling timesteps; returns z at `final_alpha_cumprod`."""
    alpha, sigma = _next_levels(schedule, timesteps, schedule.final_alpha_cumprod)

    def step(z: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        t, alpha_s, sigma_s = inputs
        x0, eps = denoise(z, jnp.full(z.shape[0], t))
        return alpha_s.astype(z.dtype) * x0 + sigma_s.astype(z.dtype) * eps, None

    return jax.lax.scan(step, z_T, (jnp.asarray(timesteps), alpha, sigma))[0]


def dpmpp_sample(denoise: Denoise, schedule: Schedule, z_T: Latents, timesteps: Timesteps) -> Latents:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) over falling timesteps, down to sigma = 0.

    As diffusers' DPMSolverMultistepScheduler with its defaults: the first step is of first order, and so is the last,
    which goes to sigma = 0 and returns x0 itself.
    """
    n = len(timesteps)
    timesteps = jnp.asarray(timesteps)
    alpha_s, sigma_s = _next_levels(schedule, timesteps, 1.0)
    lambda_t = schedule.log_snr(timesteps)
    h = jnp.concatenate([lambda_t[1:] - lambda_t[:-1], jnp.full(1, jnp.inf, lambda_t.dtype)])
    h_before = jnp.concatenate([jnp.ones(1, h.dtype), h[:-1]])
    # D = x0 + (x0 - x0_before) / (2 r), r = h_before / h
    inner = (jnp.arange(n) > 0) & (jnp.arange(n) < n - 1)
    weight = jnp.where(inner, 0.5 * h / h_before, 0.0)

    def step(carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]):
        z, x0_before = carry
        t, a_s, s_s, h, weight = (x.astype(z.dtype) if i else x for i, x in enumerate(inputs))
        t = jnp.full(z.shape[0], t)
        x0, _ = denoise(z, t)
        d = x0 + weight * (x0 - x0_before)
        sigma_t = column(schedule.sigma(t), z)
        return (s_s / sigma_t * z - a_s * jnp.expm1(-h) * d, x0), None

    inputs = (timesteps, alpha_s, sigma_s, h, weight)
    return jax.lax.scan(step, (z_T, jnp.zeros_like(z_T)), inputs)[0][0]


def _next_levels(schedule: Schedule, timesteps: Timesteps, final_alpha_cumprod: float) -> tuple[jax.Array, jax.Array]:
    """alpha and sigma after each step, (n,): those of the next timestep, and of the end."""
    final = jnp.asarray([final_alpha_cumprod])
    following = jnp.asarray(timesteps)[1:]
    alpha = jnp.concatenate([schedule.alpha(following), jnp.sqrt(final)])
    return alpha, jnp.concatenate([schedule.sigma(following), jnp.sqrt(1 - final)])
