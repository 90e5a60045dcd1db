"""Grids of timesteps, and the samplers that walk them.

A sampler is one `lax.scan` over an array of falling timesteps (numpy, or an argument of a jitted function): the network
is traced once, and the number of steps is an array's length. Timesteps are integers in 0 … T-1.
"""

import itertools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lcm_jax.diffusion.guidance import Denoise, Latent
from lcm_jax.diffusion.process import Process, Time
from lcm_jax.diffusion.schedule import combine
from lcm_jax.errors import UserError

Timesteps = Int[Array, " n"] | Int[np.ndarray, " n"]

# ---- grids


def lcm_timesteps(steps: int, process: Process, original_steps: int, strength: float = 1.0) -> np.ndarray:
    """The timesteps of consistency sampling, as diffusers' LCMScheduler takes them from the trained grid.

    Args:
      steps: n.
      process: the noise process.
      original_steps: N, of the trained grid.
      strength: below 1, only the lower part of the grid is used, from int(N strength) steps on (image to image).

    Returns:
      (n,) int32, falling: 999, 759, 499, 259 for n = 4, N = 50.

    Raises:
      UserError: `steps` is not in 1 … int(N strength), `strength` not in (0, 1], or N not in 1 … T.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must be above 0 and at most 1")
    grid = process.grid(original_steps)[: int(original_steps * strength)][::-1]
    if not 1 <= steps <= len(grid):
        cut = "" if strength == 1 else f" (strength {strength} of {original_steps})"
        raise UserError(f"steps is {steps}; it must be in 1 … {len(grid)}{cut}, the steps of the trained grid")
    return grid[np.floor(np.linspace(0, len(grid), steps, endpoint=False)).astype(int)]


def trailing_timesteps(steps: int, num_train_timesteps: int = 1000) -> np.ndarray:
    """Timesteps for a diffusion model, evenly spaced from T-1 down ("trailing", arXiv 2305.08891, table 2).

    Returns:
      (n,) int32, falling: 999, 749, 499, 249 for n = 4.

    Raises:
      UserError: `steps` is not in 1 … T.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise UserError(f"steps is {steps}; it must be in 1 … {num_train_timesteps}")
    spacing = num_train_timesteps / steps
    return np.round(num_train_timesteps - spacing * np.arange(steps)).astype(np.int32) - 1


def leading_timesteps(steps: int, num_train_timesteps: int = 1000, offset: int = 0) -> np.ndarray:
    """Returns multiples of T // n, plus `offset` ("leading", arXiv 2305.08891, table 2): SDXL's published scheduler.

    Returns:
      (n,) int32, falling: 751, 501, 251, 1 for n = 4 and an offset of 1.

    Raises:
      UserError: `steps` is not in 1 … T, or a timestep is above T-1.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise UserError(f"steps is {steps}; it must be in 1 … {num_train_timesteps}")
    timesteps = (np.arange(steps, dtype=np.int32) * (num_train_timesteps // steps))[::-1] + np.int32(offset)
    if not (timesteps[-1] >= 0 and timesteps[0] < num_train_timesteps):
        raise UserError(f"{steps} steps with steps_offset {offset} leave 0 … {num_train_timesteps - 1}; take fewer")
    return timesteps


def last_part(timesteps: np.ndarray, strength: float) -> np.ndarray:
    """Returns the last int(n strength) timesteps: image to image of diffusers' Stable Diffusion pipelines.

    Raises:
      UserError: `strength` is not in (0, 1], or no timestep is left.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; it must be above 0 and at most 1")
    kept = int(len(timesteps) * strength)
    if not kept:
        raise UserError(f"strength {strength} leaves none of {len(timesteps)} steps; raise strength or steps")
    return timesteps[len(timesteps) - kept :]


def check_timesteps(timesteps: Sequence[int], num_train_timesteps: int = 1000) -> np.ndarray:
    """Returns a user's own timesteps as int32; raises UserError unless they are whole, in 0 … T-1, strictly falling."""
    given = list(timesteps)
    try:
        checked = [operator.index(t) for t in given]
    except TypeError:
        raise UserError(f"timesteps is {given}; it must hold whole numbers") from None
    if not checked:
        raise UserError("timesteps is empty; give at least one")
    for t in checked:
        if not 0 <= t < num_train_timesteps:
            raise UserError(f"timesteps has {t}; each must be in 0 … {num_train_timesteps - 1}")
    for t, s in itertools.pairwise(checked):
        if s >= t:
            raise UserError(f"timesteps has {s} after {t}; they must strictly decrease")
    return np.array(checked, np.int32)


# ---- samplers


def consistency_sample(
    f: Callable[[Latent, Time], Latent], process: Process, z_T: Latent, timesteps: Timesteps, noise: Array
) -> Latent:
    """Multistep consistency sampling (CM, arXiv 2303.01469, algorithm 1): f, then fresh noise to the next timestep.

    Args:
      f: consistency function, (z, t (B,)) -> x0.
      z_T: (B, …) noise at the first timestep.
      timesteps: (n,).
      noise: (n-1, B, …), or a key that one subkey a step is split from. No noise follows the last step.
    """
    n = len(timesteps)
    t = jnp.asarray(timesteps)
    # the last step adds no noise: alpha 1, sigma 0
    alpha = jnp.append(process.alpha(t[1:]), 1.0)
    sigma = jnp.append(process.sigma(t[1:]), 0.0)
    if is_key := jnp.issubdtype(noise.dtype, jax.dtypes.prng_key):
        draws = jax.random.split(noise, n)
    else:
        draws = jnp.concatenate([noise, jnp.zeros((1, *z_T.shape), z_T.dtype)])

    def step(z: Latent, each: tuple[Array, ...]) -> tuple[Latent, None]:
        t, alpha, sigma, draw = each
        eps = jax.random.normal(draw, z.shape, z.dtype) if is_key else draw
        return combine(f(z, _for_all(t, z)), eps, alpha, sigma), None

    return jax.lax.scan(step, z_T, (t, alpha, sigma, draws))[0]


def ddim_sample(
    denoise: Denoise, process: Process, z_T: Latent, timesteps: Timesteps, final_alpha_cumprod: float | None = None
) -> Latent:
    """DDIM (arXiv 2010.02502, eq. 12, no noise) along the timesteps: Euler's method in sigma_t / alpha_t.

    Args:
      denoise: (z, t (B,)) -> (x0, eps).
      z_T: (B, …) noise at the first timestep.
      timesteps: (n,).
      final_alpha_cumprod: abar where the last step ends; the process's by default.
    """
    t = jnp.asarray(timesteps)
    final = process.final_alpha_cumprod if final_alpha_cumprod is None else final_alpha_cumprod
    alpha = jnp.append(process.alpha(t[1:]), final**0.5)
    sigma = jnp.append(process.sigma(t[1:]), (1 - final) ** 0.5)

    def step(z: Latent, each: tuple[Array, ...]) -> tuple[Latent, None]:
        t, alpha_s, sigma_s = each
        return combine(*denoise(z, _for_all(t, z)), alpha_s, sigma_s), None

    return jax.lax.scan(step, z_T, (t, alpha, sigma))[0]


def dpmpp_sample(denoise: Denoise, process: Process, z_T: Latent, timesteps: Timesteps) -> Latent:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): order 2 by the step before, one call a step.

    Like diffusers' DPMSolverMultistepScheduler by default: the last step ends at sigma = 0, which set_alpha_to_one does
    not change, and is of first order, as is the first. That last step returns its x0.

    Args:
      denoise: (z, t (B,)) -> (x0, eps).
      z_T: (B, …) noise at the first timestep.
      timesteps: (n,).
    """
    t = jnp.asarray(timesteps)
    h = jnp.append(jnp.diff(process.log_snr(t)), jnp.inf)
    sigma = jnp.append(process.sigma(t), 0.0)
    alpha = jnp.append(process.alpha(t[1:]), 1.0)
    # D = (1 + 1/2r) x0_i - 1/2r x0_{i-1}, r = h_{i-1} / h_i; without the second term first and last
    half_over_r = jnp.zeros_like(h).at[1:-1].set(0.5 * h[1:-1] / h[:-2])
    coefficients = (sigma[1:] / sigma[:-1], -alpha * jnp.expm1(-h), half_over_r)

    def step(carry: tuple[Latent, Latent], each: tuple[Array, ...]) -> tuple[tuple[Latent, Latent], None]:
        z, x0_before = carry
        t, ratio, weight, half_over_r = each
        x0, _ = denoise(z, _for_all(t, z))
        D = combine(x0, x0_before, 1 + half_over_r, -half_over_r)
        return (combine(z, D, ratio, weight), x0), None

    return jax.lax.scan(step, (z_T, jnp.zeros_like(z_T)), (t, *coefficients))[0][0]


def _for_all(t: Array, z: Latent) -> Int[Array, " b"]:
    return jnp.full(z.shape[0], t)
