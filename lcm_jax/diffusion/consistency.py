"""The consistency function: what a network's output becomes so that f(z, 0) = z."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from lcm_jax.diffusion.schedule import Schedule, column

SIGMA_DATA = 0.5


def boundary_scalings(
    t: Num[Array, " b"], timestep_scaling: float = 10.0, sigma_data: float = SIGMA_DATA
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """c_skip = sd^2 / (tau^2 + sd^2), c_out = tau / sqrt(tau^2 + sd^2), tau = timestep_scaling * t.

    LCM, section 4.1. At t = 0 they are 1 and 0 exactly; unlike in EDM, c_out has no factor sigma_data.
    """
    tau = timestep_scaling * t.astype(jnp.promote_types(t.dtype, jnp.float32))
    total = tau**2 + sigma_data**2
    return sigma_data**2 / total, tau * jax.lax.rsqrt(total)


def consistency_function(
    schedule: Schedule, output: jax.Array, z: jax.Array, t: Num[Array, " b"], timestep_scaling: float = 10.0
) -> jax.Array:
    """f = c_skip z + c_out x0(z, t) (CM, equation 5; LCM, equation 9), x0 read from the network's output."""
    x0, _ = schedule.to_x0_eps(output, z, t)
    return mix(x0, z, t, timestep_scaling)


def mix(x0: jax.Array, z: jax.Array, t: Num[Array, " b"], timestep_scaling: float = 10.0) -> jax.Array:
    """f = c_skip z + c_out x0."""
    c_skip, c_out = boundary_scalings(t, timestep_scaling)
    return column(c_skip, z) * z + column(c_out, z) * x0
