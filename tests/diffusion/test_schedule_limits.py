"""The schedule at the ends of its range and of its precision."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule, alpha_sigma
from lcm_jax.interop.scheduler import read_schedule

ZERO_SNR = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
LAST = jnp.array([999])


def test_the_tables_are_within_float32_of_the_peers():
    peer = diffusers.LCMScheduler(rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ZERO_SNR.alphas_cumprod, peer.alphas_cumprod.numpy(), rtol=3e-5, atol=1e-8)
    assert ZERO_SNR.alphas_cumprod.dtype == np.float64


def test_float64_is_not_rounded():
    schedule = Schedule()
    with jax.enable_x64(True):
        t = jnp.linspace(0.0, 999.0, 333)
        for value in (schedule.alpha(t), schedule.sigma(jnp.arange(5)), schedule.log_snr(t), schedule.time_of(t)):
            assert value.dtype == jnp.float64
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)
        for ours, closed in zip((schedule.alpha(t), schedule.sigma(t)), alpha_sigma(schedule.log_snr(t)), strict=True):
            np.testing.assert_allclose(ours, closed, rtol=1e-12)


def test_sigma_is_precise_near_data():
    """1 - abar is 8.5e-4 at t = 0: it must not be a difference of float32 numbers."""
    schedule, t = Schedule(), np.array([0, 1, 2, 3])
    exact = np.sqrt(1 - schedule.alphas_cumprod[t])
    np.testing.assert_allclose(schedule.sigma(t), exact, rtol=2e-7)
    np.testing.assert_allclose(schedule.sigma(jnp.float32(t)), exact, rtol=5e-7)
    np.testing.assert_allclose(alpha_sigma(schedule.log_snr(t))[1], exact, rtol=2e-6)


def test_zero_terminal_snr_has_finite_log_snr_and_time():
    log_snr = ZERO_SNR.log_snr(jnp.arange(1000))
    assert (jnp.diff(log_snr) < 0).all()
    assert jnp.isfinite(log_snr).all()
    np.testing.assert_allclose(ZERO_SNR.time_of(log_snr), np.arange(1000), atol=5e-3)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[1:])
def test_zero_terminal_snr_gives_x0_and_eps(prediction_type):
    rng = np.random.default_rng(0)
    output, z = rng.standard_normal((2, 1, 4, 4, 2), np.float32)
    x0, eps = dataclasses.replace(ZERO_SNR, prediction_type=prediction_type).to_x0_eps(output, z, LAST)
    np.testing.assert_array_equal(x0, -output if prediction_type == "v_prediction" else output)
    np.testing.assert_array_equal(eps, z)


def test_equal_schedules_are_one_to_jit():
    a, b = Schedule(), read_schedule({"_class_name": "LCMScheduler"})
    assert a == b
    traced = []

    def alpha(schedule, t):
        traced.append(1)
        return schedule.alpha(t)

    program = jax.jit(alpha, static_argnums=0)
    np.testing.assert_array_equal(program(a, jnp.arange(3)), program(b, jnp.arange(3)))
    assert len(traced) == 1


def test_fields_are_an_lcm_schedulers():
    """So a schedule's fields can be written into scheduler_config.json as they are."""
    fields = {field.name: field.default for field in dataclasses.fields(Schedule)}
    config = diffusers.LCMScheduler().config
    assert fields == {name: config[name] for name in fields}
