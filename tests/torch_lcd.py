"""Algorithm 1 of latent consistency models (arXiv 2310.04378) in torch, against which the JAX loss is tested.

For N = 50 trained timesteps, k = 20 timesteps apart, on diffusers' noise schedule of Stable Diffusion.
"""

from collections.abc import Callable
from typing import Any

import diffusers
import jax
import numpy as np
import torch

from lcm_jax.objectives.lcd import Draws

SKIP, TIMESTEP_SCALING = 20, 10.0
Condition = Any  # a tensor (B, …), or a tree of them
Network = Callable[..., torch.Tensor]  # (z, t, condition) or (z, t, condition, w embedding) → its raw output
X0Eps = tuple[torch.Tensor, torch.Tensor]


def per_sample(values: torch.Tensor) -> torch.Tensor:
    """Returns values (B,) as float64 (B, 1, 1, 1)."""
    return values.double()[:, None, None, None]


class Algorithm1:
    """The loss of one batch; latents in the networks' layout, schedule and solvers in float64."""

    def __init__(
        self, student: Network, target: Network, teacher: Network, *, prediction_type: str = "epsilon", solver: str
    ) -> None:
        """Args: the networks, what they predict, and the ODE solver: "ddim", "dpm" or "dpmpp"."""
        self.student, self.target, self.teacher = student, target, teacher
        self.prediction_type, self.solver = prediction_type, solver
        config = diffusers.LCMScheduler().config
        roots = torch.linspace(
            config["beta_start"] ** 0.5, config["beta_end"] ** 0.5, config["num_train_timesteps"], dtype=torch.float64
        )
        self.abar = torch.cumprod(1 - roots**2, 0)

    def loss(
        self,
        z_0: torch.Tensor,
        eps: torch.Tensor,
        condition: Condition,
        null: Condition,
        w_emb: torch.Tensor,
        draws: Draws,
        *,
        huber_c: float = 1e-3,
        distance: str = "huber",
    ) -> torch.Tensor:
        """Returns d(f(z_t, t), f⁻(z_s, s)), the mean over a batch.

        Args:
          z_0, eps: scaled latents and the noise added to them, (B, …).
          condition, null: text features (B, L, D), or a family's tree, of the prompts and of the empty prompt.
          w_emb: embedding of w (B, W).
          draws: timestep numbers `i`, guidance `w` and dropped prompts `drop`; `eps` is not read.
          huber_c, distance: d.
        """
        drop = torch.from_numpy(np.array(draws.drop))
        condition = jax.tree.map(lambda c, n: torch.where(drop.reshape(-1, *[1] * (c.ndim - 1)), n, c), condition, null)
        t = SKIP * (torch.from_numpy(np.array(draws.i)).long() + 1) - 1
        s = torch.clamp(t - SKIP, min=0)
        with torch.no_grad():
            alpha, sigma, _ = self._at(t)
            z_t = (alpha * z_0 + sigma * eps).float()
            z_s = self._solve(z_t, t, s, condition, null, per_sample(torch.from_numpy(np.array(draws.w)))).float()
            goal = self._f(self.target, z_s, s, condition, w_emb)
        difference = self._f(self.student, z_t, t, condition, w_emb) - goal
        if distance == "l2":
            return (difference**2).mean()
        return ((difference**2 + huber_c**2).sqrt() - huber_c).mean()

    def _at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns alpha, sigma and lambda of timesteps (B,)."""
        abar = per_sample(self.abar[t])
        return abar.sqrt(), (1 - abar).sqrt(), 0.5 * torch.log(abar / (1 - abar))

    def _middle(
        self, lambda_t: torch.Tensor, lambda_s: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns alpha, sigma and the real time half way, from the table of log(alpha)."""
        abar = torch.sigmoid(lambda_t + lambda_s)
        rising = -0.5 * torch.log(self.abar).numpy()
        time = np.interp(-0.5 * torch.log(abar).flatten().numpy(), rising, np.arange(len(rising)))
        return abar.sqrt(), (1 - abar).sqrt(), torch.tensor(time, dtype=torch.float32)

    def _x0_eps(self, output: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> X0Eps:
        if self.prediction_type == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.prediction_type == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, sigma * z + alpha * output

    def _solve(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        condition: Condition,
        null: Condition,
        w: torch.Tensor,
    ) -> torch.Tensor:
        """Returns psi: the teacher's guided solution at s, from z at t."""

        def guided(z: torch.Tensor, t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> X0Eps:
            both = [self._x0_eps(self.teacher(z.float(), t, c).double(), z, alpha, sigma) for c in (condition, null)]
            x0, eps = ((1 + w) * cond - w * uncond for cond, uncond in zip(*both, strict=True))
            return x0, eps

        alpha_t, sigma_t, lambda_t = self._at(t)
        alpha_s, sigma_s, lambda_s = self._at(s)
        h = lambda_s - lambda_t
        x0, eps = guided(z, t, alpha_t, sigma_t)
        if self.solver == "ddim":
            return alpha_s * x0 + sigma_s * eps
        alpha_m, sigma_m, time_m = self._middle(lambda_t, lambda_s)
        if self.solver == "dpm":
            u = alpha_m / alpha_t * z - sigma_m * torch.expm1(h / 2) * eps
            _, eps = guided(u, time_m, alpha_m, sigma_m)
            return alpha_s / alpha_t * z - sigma_s * torch.expm1(h) * eps
        u = sigma_m / sigma_t * z - alpha_m * torch.expm1(-h / 2) * x0
        x0, _ = guided(u, time_m, alpha_m, sigma_m)
        return sigma_s / sigma_t * z - alpha_s * torch.expm1(-h) * x0

    def _f(
        self, network: Network, z: torch.Tensor, t: torch.Tensor, condition: Condition, w_emb: torch.Tensor
    ) -> torch.Tensor:
        """Returns the consistency function, with its boundary condition at t = 0."""
        alpha, sigma, _ = self._at(t)
        x0, _ = self._x0_eps(network(z, t, condition, w_emb).double(), z, alpha, sigma)
        tau = TIMESTEP_SCALING * per_sample(t)
        return 0.25 / (tau**2 + 0.25) * z + tau / (tau**2 + 0.25).sqrt() * x0
