"""Psi against the closed form: for Gaussian data the denoiser is linear, and so is the exact path of the ODE."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.diffusion.solvers import SOLVERS
from lcm_jax.errors import UserError

ORDERS = {"ddim": 1, "dpm": 2, "dpmpp": 2}
MU, DEVIATION = 0.7, 0.4
SCHEDULE = Schedule()


def gaussian_denoiser(schedule):
    """E[x0 | z_t] and E[eps | z_t] for x0 ~ N(MU, DEVIATION^2)."""

    def denoise(z, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        score = (z - alpha * MU) / (alpha**2 * DEVIATION**2 + sigma**2)
        return MU + alpha * DEVIATION**2 * score, sigma * score

    return denoise


def exact(schedule, z_t, t, s):
    """The ODE keeps (z - its mean) / its deviation."""
    mean_t, mean_s = schedule.alpha(t)[:, None] * MU, schedule.alpha(s)[:, None] * MU
    deviation_t, deviation_s = (
        jnp.sqrt((schedule.alpha(u) * DEVIATION) ** 2 + schedule.sigma(u) ** 2)[:, None] for u in (t, s)
    )
    return mean_s + (z_t - mean_t) * deviation_s / deviation_t


def test_every_solver_has_an_order():
    assert set(ORDERS) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_order(name):
    """n equal steps of h = delta lambda from t = 900 to 100: the error falls as h^order."""
    with jax.enable_x64(True):
        start, end = SCHEDULE.log_snr(jnp.array([900.0])), SCHEDULE.log_snr(jnp.array([100.0]))
        z_start = jnp.array([[-1.3, 0.2, 2.1]])
        errors, counts = [], [32, 64, 128]
        for n in counts:
            times = SCHEDULE.time_of(start + (end - start) * jnp.linspace(0, 1, n + 1))
            z = z_start
            for t, s in itertools.pairwise(times):
                z = SOLVERS[name](gaussian_denoiser(SCHEDULE), SCHEDULE, z, t[None], s[None])
            assert z.dtype == jnp.float64
            errors.append(float(jnp.abs(z - exact(SCHEDULE, z_start, times[:1], times[-1:])).max()))
        orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    np.testing.assert_allclose(orders, ORDERS[name], atol=0.1)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_of_the_grid_in_float32(name):
    """The step of distillation, k = 20, each sample at its own t; the second order is the nearer at each."""
    t = jnp.array([19, 39, 259, 499, 999])
    s = jnp.maximum(t - 20, 0)
    x0, eps = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    z_t = SCHEDULE.add_noise(MU + DEVIATION * x0, eps, t)
    denoise = gaussian_denoiser(SCHEDULE)
    z_s, first = (SOLVERS[solver](denoise, SCHEDULE, z_t, t, s) for solver in (name, "ddim"))
    assert z_s.dtype == jnp.float32
    error, error_first = (jnp.abs(z - exact(SCHEDULE, z_t, t, s)).max(axis=1) for z in (z_s, first))
    assert (error < 0.03).all()
    if name != "ddim":
        assert (error < 0.5 * error_first).all()
    for i in range(5):  # a sample's step does not depend on its neighbours
        alone = SOLVERS[name](denoise, SCHEDULE, z_t[i : i + 1], t[i : i + 1], s[i : i + 1])
        np.testing.assert_allclose(alone[0], z_s[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_calls(name):
    """One call at t; the second at the middle of the log-SNR, in float32."""
    seen = []

    def denoise(z, t):
        seen.append(t)
        return gaussian_denoiser(SCHEDULE)(z, t)

    SOLVERS[name](denoise, SCHEDULE, jnp.ones((2, 3)), jnp.array([19, 999]), jnp.array([0, 979]))
    assert len(seen) == ORDERS[name]
    np.testing.assert_array_equal(seen[0], [19, 999])
    if len(seen) == 2:
        assert seen[1].dtype == jnp.float32
        np.testing.assert_allclose(seen[1], [3.6, 989], atol=0.2)


@pytest.mark.parametrize(("name", "constant"), [("ddim", "x0"), ("ddim", "eps"), ("dpm", "eps"), ("dpmpp", "x0")])
def test_exact_where_the_prediction_is_constant(name, constant):
    x0, eps = jnp.full((1, 3), 0.4), jnp.full((1, 3), -1.2)
    t, s = jnp.array([700]), jnp.array([200])
    z_t = SCHEDULE.add_noise(x0, eps, t)

    def denoise(z, t):
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        return (x0, (z - alpha * x0) / sigma) if constant == "x0" else ((z - sigma * eps) / alpha, eps)

    z_s = SOLVERS[name](denoise, SCHEDULE, z_t, t, s)
    np.testing.assert_allclose(z_s, SCHEDULE.add_noise(x0, eps, s), rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp"])
def test_from_zero_terminal_snr(name):
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    t, s = jnp.array([999]), jnp.array([979])
    z_t = jnp.array([[-1.3, 0.2, 2.1]])
    z_s = SOLVERS[name](gaussian_denoiser(schedule), schedule, z_t, t, s)
    np.testing.assert_allclose(z_s, exact(schedule, z_t, t, s), atol=2e-3)


def test_dpm_refuses_zero_terminal_snr():
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"'dpm' needs a positive terminal SNR.*use 'ddim' or 'dpmpp'"):
        SOLVERS["dpm"](gaussian_denoiser(schedule), schedule, jnp.ones((1, 3)), jnp.array([999]), jnp.array([979]))
