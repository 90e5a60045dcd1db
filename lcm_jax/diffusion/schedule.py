"""The noise schedule z_t = alpha_t x0 + sigma_t eps, and what a network's output means under it.

alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), lambda_t = log(alpha_t / sigma_t), t = 0 … T-1 from little noise to
much. Between two timesteps log(alpha) is linear in t, as in DPM-Solver (arXiv 2206.00927). Tables are
float64 and become JAX's default float at use: float32, or float64 under enable_x64.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcm_jax.diffusion.process import Time
from lcm_jax.errors import UserError, one_of

MOST_TIMESTEPS = 100_000  # a hundred times what models are trained with; the tables have one value per timestep
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule of T discrete timesteps. Hashable; the fields are those of an LCMScheduler.

    Attributes:
      num_train_timesteps: T.
      beta_start, beta_end: the ends of "linear" (in beta) and "scaled_linear" (in its root); "squaredcos_cap_v2" has
        its own.
      rescale_betas_zero_snr: shift and scale sqrt(abar) so that abar_{T-1} = 0 (arXiv 2305.08891, algorithm 1).
      prediction_type: what the network's output is: eps, v = alpha eps - sigma x0, or x0.
      set_alpha_to_one: whether the last step of DDIM ends at abar = 1, or at abar_0.
      steps_offset: kept for the folder's sake; only "leading" timesteps, which we don't use, are shifted by it.

    Raises:
      UserError: a field has no such value; epsilon prediction with zero terminal SNR.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = True
    steps_offset: int = 0

    def __post_init__(self) -> None:
        one_of("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        T = self.num_train_timesteps
        if not isinstance(T, int) or not 2 <= T <= MOST_TIMESTEPS:
            raise UserError(f"num_train_timesteps is {T!r}; it must be a whole number in 2 … {MOST_TIMESTEPS}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"beta_start is {self.beta_start}, beta_end {self.beta_end}; needed: 0 < start <= end < 1")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "prediction_type is 'epsilon' with rescale_betas_zero_snr: at zero terminal SNR z_t is pure noise, "
                "from which x0 can't be computed; it must be 'v_prediction' or 'sample'"
            )
        alpha = np.sqrt(self.alphas_cumprod).astype(np.float32)[: T - 1 if self.rescale_betas_zero_snr else T]
        falls = (np.diff(self.alphas_cumprod) < 0).all() and self.alphas_cumprod[0] < 1
        if not falls or (alpha < np.finfo(np.float32).tiny).any():
            raise UserError(
                f"beta_start {self.beta_start}, beta_end {self.beta_end} and num_train_timesteps {T} give an unusable "
                "schedule: alpha = sqrt(alphas_cumprod) must start below 1, strictly decrease, and stay above 1.2e-38 "
                "(float32), but for 0 at the last timestep with rescale_betas_zero_snr"
            )

    # ---- tables

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """abar, (T,) float64, falling."""
        T = self.num_train_timesteps
        if self.beta_schedule == "squaredcos_cap_v2":  # arXiv 2102.09672, eq. 17, each beta at most .999
            f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, T) ** 2
        else:
            betas = np.linspace(self.beta_start, self.beta_end, T)
        abar = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(abar)
            abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return abar

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether alpha is 0 at the last timestep."""
        return self.rescale_betas_zero_snr

    @property
    def final_alpha_cumprod(self) -> float:
        """abar where DDIM's last step ends."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    @functools.cached_property
    def _log_alpha(self) -> np.ndarray:
        """Finite: at zero terminal SNR abar counts as 2^-24, diffusers' value in its DPM-Solver."""
        return 0.5 * np.log(np.where(self.alphas_cumprod > 0, self.alphas_cumprod, 2.0**-24))

    # ---- functions of t

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """alpha_t for integer t (exact, 0 at zero SNR), or for real t in [0, T-1]."""
        if _is_index(t):
            return jnp.asarray(np.sqrt(self.alphas_cumprod))[t]
        return jnp.exp(self._interpolate(t))

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """sigma_t, likewise."""
        if _is_index(t):
            return jnp.asarray(np.sqrt(1 - self.alphas_cumprod))[t]
        return jnp.sqrt(-jnp.expm1(2 * self._interpolate(t)))

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """lambda_t = log(alpha_t / sigma_t), likewise, but finite: about -8.3 at zero SNR (abar counts as 2^-24)."""
        if _is_index(t):
            return jnp.asarray(self._log_alpha - 0.5 * np.log(-np.expm1(2 * self._log_alpha)))[t]
        log_alpha = self._interpolate(t)
        return log_alpha - 0.5 * jnp.log(-jnp.expm1(2 * log_alpha))

    def time_of(self, log_snr: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """The inverse of `log_snr`: the real t in [0, T-1] with this lambda."""
        log_alpha = 0.5 * jax.nn.log_sigmoid(2 * log_snr)
        # both turned round, since interp wants rising nodes
        return jnp.interp(-log_alpha, jnp.asarray(-self._log_alpha), jnp.arange(self.num_train_timesteps) * 1.0)

    def _interpolate(self, t: Time) -> Float[Array, "*t"]:
        """log(alpha_t) for real t."""
        return jnp.interp(t, jnp.arange(self.num_train_timesteps) * 1.0, jnp.asarray(self._log_alpha))

    # ---- grids

    def grid(self, steps: int) -> np.ndarray:
        """The N timesteps that a consistency model is trained at: t_i = (i + 1) k - 1 with k = T // N, rising, int32.

        Raises:
          UserError: N is not in 1 … T.
        """
        if not 1 <= steps <= self.num_train_timesteps:
            raise UserError(f"original_steps is {steps}; it must be in 1 … {self.num_train_timesteps}")
        k = self.num_train_timesteps // steps
        return np.arange(1, steps + 1, dtype=np.int32) * k - 1

    # ---- functions of arrays

    def add_noise(self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Time) -> Float[Array, "b *d"]:
        """z_t = alpha_t x0 + sigma_t eps; t (B,) or one for all."""
        return combine(x0, eps, self.alpha(t), self.sigma(t))

    def to_x0_eps(
        self, output: Float[Array, "b *d"], z: Float[Array, "b *d"], t: Time
    ) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
        """What the network's output at (z, t) says of x0 and eps, by the prediction type."""
        alpha, sigma = per_sample(self.alpha(t), z), per_sample(self.sigma(t), z)
        if self.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * z - sigma * output, alpha * output + sigma * z
        return output, (z - alpha * output) / sigma

    def target(self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Time) -> Float[Array, "b *d"]:
        """What a network that is trained to denoise should put out: eps, v = alpha eps - sigma x0 (arXiv 2202.00512,
        appendix D), or x0."""
        if self.prediction_type == "v_prediction":
            return combine(eps, -x0, self.alpha(t), self.sigma(t))
        return eps if self.prediction_type == "epsilon" else x0


def alpha_sigma(log_snr: Float[Array, "*t"]) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Returns (alpha, sigma) of lambda: alpha^2 = sigmoid(2 lambda), sigma^2 = sigmoid(-2 lambda)."""
    return jnp.sqrt(jax.nn.sigmoid(2 * log_snr)), jnp.sqrt(jax.nn.sigmoid(-2 * log_snr))


def combine(
    x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], alpha: Float[Array, "*t"], sigma: Float[Array, "*t"]
) -> Float[Array, "b *d"]:
    """alpha x0 + sigma eps; alpha and sigma (B,) or one for all."""
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


def per_sample(v: Array, z: Float[Array, "b *d"]) -> Array:
    """A value for each sample, (B,), with axes of length one appended, so that it broadcasts against z (B, …)."""
    return jnp.reshape(v, jnp.shape(v) + (1,) * (z.ndim - jnp.ndim(v)))


def _is_index(t: Time) -> bool:
    return jnp.issubdtype(jnp.result_type(t), jnp.integer)
