"""The consistency function f: from any point of an ODE trajectory to its origin, the identity at t = 0."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.diffusion.process import Process, Time
from lcm_jax.diffusion.schedule import combine


def boundary_scalings(
    t: Time, timestep_scaling: float = 10.0, sigma_data: float = 0.5
) -> tuple[Float[Array, "*t"], Float[Array, "*t"]]:
    """Returns (c_skip, c_out) of the timesteps t, with c_skip(0) = 1 and c_out(0) = 0.

    As diffusers' LCMScheduler has them: unlike in CM (arXiv 2303.01469, appendix C) and EDM, c_out has no factor
    sigma_data, so that it tends to 1.
    """
    tau = timestep_scaling * jnp.asarray(t)
    c_skip = sigma_data**2 / (tau**2 + sigma_data**2)
    c_out = tau / jnp.sqrt(tau**2 + sigma_data**2)
    return c_skip, c_out


def with_boundary(
    x0: Float[Array, "b *d"], z: Float[Array, "b *d"], t: Time, timestep_scaling: float = 10.0
) -> Float[Array, "b *d"]:
    """f = c_skip z + c_out x0, of a prediction x0 at (z, t) (CM, eq. 5; LCM, arXiv 2310.04378, section 4.1)."""
    c_skip, c_out = boundary_scalings(t, timestep_scaling)
    return combine(z, x0, c_skip, c_out)


def consistency_function(
    process: Process,
    output: Float[Array, "b *d"],
    z: Float[Array, "b *d"],
    t: Time,
    timestep_scaling: float = 10.0,
) -> Float[Array, "b *d"]:
    """f of a network's raw output at (z, t)."""
    x0, _ = process.to_x0_eps(output, z, t)
    return with_boundary(x0, z, t, timestep_scaling)
