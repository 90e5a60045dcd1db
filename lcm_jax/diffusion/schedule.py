"""The noise schedule: z_t = alpha_t x0 + sigma_t eps, and the ways a network's output can be read."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lcm_jax.errors import UserError, one_of

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

Latents = Float[Array, "b h w c"]


_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
_SD_RANGE = {"beta_start": 0.00085, "beta_end": 0.012}
# diffusers' scheduler classes over such a table, and where their defaults differ from the above
SCHEDULER_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": _SD_RANGE,
    "KDPM2DiscreteScheduler": _SD_RANGE,
    "KDPM2AncestralDiscreteScheduler": _SD_RANGE,
    "DEISMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {**_SD_RANGE, "beta_schedule": "scaled_linear"},
}


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of a scheduler_config.json that make the table, what is missing as diffusers' class has it.

    Raises: UserError for a class without such a table, and for a table given as a list.
    """
    name = config.get("_class_name", "DDIMScheduler")
    one_of("_class_name", name, SCHEDULER_CLASSES)
    if config.get("trained_betas") is not None:
        raise UserError("trained_betas is set; supported are the beta_schedules " + ", ".join(BETA_SCHEDULES))
    defaults = {**_DEFAULTS, **SCHEDULER_CLASSES[name]}
    return {key: config.get(key, default) for key, default in defaults.items()}


def betas(kind: str, count: int, start: float, end: float) -> np.ndarray:
    """Returns beta_t, float64 (count,): "linear", "scaled_linear" (linear in sqrt(beta)) or "squaredcos_cap_v2"
    (arXiv 2102.09672, equation 17, at most 0.999)."""
    one_of("beta_schedule", kind, BETA_SCHEDULES)
    if kind == "linear":
        return np.linspace(start, end, count)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - bar[1:] / bar[:-1], 0.999)


def rescale_zero_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """Shifts and scales sqrt(abar) so that the last is 0 and the first stays (arXiv 2305.08891, Algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A table of abar over T timesteps.

    Attributes:
      alphas_cumprod: abar_t, float64 (T,), falling.
      prediction_type: what the network's output is: "epsilon", "v_prediction" or "sample".
      final_alpha_cumprod: abar after a sampler's last step: 1, or abar_0.
    """

    alphas_cumprod: np.ndarray
    prediction_type: str = "epsilon"
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise UserError(
                "prediction_type is 'epsilon', but the last timestep is pure noise (rescale_betas_zero_snr), from which "
                "noise tells nothing of the picture; v_prediction or sample would be right"
            )

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Schedule":
        """Reads a scheduler_config.json of diffusers; a missing key has the default of diffusers' class.

        Raises: UserError for a value that is not supported, naming it.
        """
        config = with_defaults(config)
        beta = betas(config["beta_schedule"], config["num_train_timesteps"], config["beta_start"], config["beta_end"])
        table = np.cumprod(1 - beta)
        if config["rescale_betas_zero_snr"]:
            table = rescale_zero_snr(table)
        final = 1.0 if config["set_alpha_to_one"] else float(table[0])
        return cls(table, config["prediction_type"], final)

    @property
    def num_train_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether z at the last timestep is pure noise."""
        return bool(self.alphas_cumprod[-1] < 1e-12)

    def log_alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """log alpha_t; between timesteps (float t) linear. At zero terminal SNR -60, a number, in place of -inf."""
        t = jnp.asarray(t)
        with np.errstate(divide="ignore"):
            table = np.maximum(0.5 * np.log(self.alphas_cumprod), -60.0)
        if not jnp.issubdtype(t.dtype, jnp.floating):
            return jnp.asarray(table, jnp.result_type(float))[t]
        values = jnp.asarray(table, t.dtype)
        low = jnp.clip(jnp.floor(t).astype(jnp.int32), 0, len(table) - 2)
        return values[low] + (t - low) * (values[low + 1] - values[low])

    def alpha(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """alpha_t = sqrt(abar_t)."""
        if jnp.issubdtype(jnp.asarray(t).dtype, jnp.floating):
            return jnp.exp(self.log_alpha(t))
        return jnp.asarray(np.sqrt(self.alphas_cumprod), jnp.result_type(float))[t]

    def sigma(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """sigma_t = sqrt(1 - abar_t)."""
        if jnp.issubdtype(jnp.asarray(t).dtype, jnp.floating):
            return jnp.sqrt(-jnp.expm1(2 * self.log_alpha(t)))  # 1 - alpha^2 would cancel near t = 0
        return jnp.asarray(np.sqrt(1 - self.alphas_cumprod), jnp.result_type(float))[t]

    def log_snr(self, t: Num[Array, " b"]) -> Float[Array, " b"]:
        """lambda_t = log(alpha_t / sigma_t) (half the log of DPM-Solver's SNR)."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * jnp.log(-jnp.expm1(2 * log_alpha))

    def time_of(self, log_snr: Float[Array, " b"]) -> Float[Array, " b"]:
        """The time at which lambda_t has this value, a float: the inverse of the table, linear in log alpha."""
        log_alpha = -0.5 * jnp.logaddexp(0.0, -2 * log_snr)
        with np.errstate(divide="ignore"):
            table = 0.5 * np.log(self.alphas_cumprod)
        table = np.maximum(table, -60.0)[::-1].astype(log_snr.dtype)
        times = np.arange(self.num_train_timesteps)[::-1].astype(log_snr.dtype)
        return jnp.interp(log_alpha, table, times)

    def add_noise(self, x0: Latents, eps: Latents, t: Num[Array, " b"]) -> Latents:
        """z_t = alpha_t x0 + sigma_t eps."""
        return column(self.alpha(t), x0) * x0 + column(self.sigma(t), x0) * eps

    def to_x0_eps(self, output: Latents, z: Latents, t: Num[Array, " b"]) -> tuple[Latents, Latents]:
        """Reads the network's output at (z, t) as a prediction of (x0, eps): the only place that knows its type."""
        alpha, sigma = column(self.alpha(t), z), column(self.sigma(t), z)
        if self.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.prediction_type == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, alpha * output + sigma * z

    def target(self, x0: Latents, eps: Latents, t: Num[Array, " b"]) -> Latents:
        """What the network should have put out at z_t: eps, x0, or v = alpha eps - sigma x0 (arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        return column(self.alpha(t), x0) * eps - column(self.sigma(t), x0) * x0


def column(value: Float[Array, " b"], like: jax.Array) -> jax.Array:
    """Returns (b,) as (b, 1, 1, …), to be multiplied with `like`."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))
