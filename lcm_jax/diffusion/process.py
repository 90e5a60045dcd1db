"""The interface of a noise process z_t = alpha_t x0 + sigma_t eps, in which solvers, samplers and losses are written.

`Schedule` is the variance-preserving one.
"""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

Time = Int[Array, "*t"] | Float[Array, "*t"]


@runtime_checkable
class Process(Protocol):
    """What is known of a noise process and of a network trained under it.

    Attributes:
      num_train_timesteps: T; times are 0 … T-1, from little noise to much.
      prediction_type: what the network's output is: "epsilon", "v_prediction" or "sample".
      final_alpha_cumprod: alpha^2 at which the last step of DDIM ends.
      has_zero_terminal_snr: whether alpha is 0 at T-1.
    """

    @property
    def num_train_timesteps(self) -> int: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def final_alpha_cumprod(self) -> float: ...
    @property
    def has_zero_terminal_snr(self) -> bool: ...

    def alpha(self, t: Time) -> Float[Array, "*t"]:
        """Returns alpha_t."""
        ...

    def sigma(self, t: Time) -> Float[Array, "*t"]:
        """Returns sigma_t."""
        ...

    def log_snr(self, t: Time) -> Float[Array, "*t"]:
        """Returns lambda_t = log(alpha_t / sigma_t)."""
        ...

    def time_of(self, log_snr: Float[Array, "*t"]) -> Float[Array, "*t"]:
        """Returns the real time with this lambda."""
        ...

    def grid(self, steps: int) -> np.ndarray:
        """Returns the `steps` timesteps, rising, at which a consistency model is trained."""
        ...

    def add_noise(self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Time) -> Float[Array, "b *d"]:
        """Returns z_t."""
        ...

    def to_x0_eps(self, output: Float[Array, "b *d"], z: Float[Array, "b *d"], t: Time) -> tuple[Any, Any]:
        """Returns (x0, eps) from the network's output at (z, t)."""
        ...

    def target(self, x0: Float[Array, "b *d"], eps: Float[Array, "b *d"], t: Time) -> Float[Array, "b *d"]:
        """Returns the output of a network that predicts perfectly."""
        ...
