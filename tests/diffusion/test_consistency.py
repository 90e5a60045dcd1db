"""The consistency function and its boundary condition."""

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax.diffusion.consistency import boundary_scalings, consistency_function
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule


@pytest.mark.parametrize("timestep_scaling", [10.0, 0.03])
def test_scalings_are_the_peers(timestep_scaling):
    peer = diffusers.LCMScheduler(timestep_scaling=timestep_scaling)
    t = np.array([0, 1, 19, 259, 999])
    ours = boundary_scalings(t, timestep_scaling)
    theirs = peer.get_scalings_for_boundary_condition_discrete(torch.from_numpy(t))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_sigma_data_moves_the_boundary():
    (skip, out), (wider_skip, wider_out) = (
        boundary_scalings(np.array([1]), 1.0),
        boundary_scalings(np.array([1]), 1.0, 2.0),
    )
    np.testing.assert_allclose([skip[0], out[0]], [0.2, 1 / 1.25**0.5], rtol=1e-6)
    np.testing.assert_allclose([wider_skip[0], wider_out[0]], [0.8, 1 / 5**0.5], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_identity_at_zero(prediction_type):
    rng = np.random.default_rng(0)
    output, z = rng.standard_normal((2, 3, 4, 4, 2), np.float32)
    schedule = Schedule(prediction_type=prediction_type)
    f = consistency_function(schedule, output, z, jnp.array([0, 0, 500]))
    np.testing.assert_array_equal(f[:2], z[:2])
    x0, _ = schedule.to_x0_eps(output[2:], z[2:], jnp.array([500]))
    np.testing.assert_allclose(f[2:], x0, rtol=1e-6)


def test_timestep_scaling_is_used():
    rng = np.random.default_rng(0)
    output, z = rng.standard_normal((2, 1, 4, 4, 2), np.float32)
    a, b = (consistency_function(Schedule(), output, z, jnp.array([19]), scaling) for scaling in (10.0, 0.01))
    assert np.abs(a - b).max() > 0.1
