"""Grids and samplers against diffusers' schedulers, with the same noise and one non-linear network in both."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lcm

from lcm_jax.diffusion import sampling
from lcm_jax.diffusion.consistency import consistency_function
from lcm_jax.diffusion.schedule import PREDICTION_TYPES, Schedule
from lcm_jax.errors import UserError
from lcm_jax.interop.scheduler import read_schedule

# diffusers' DPMSolverMultistepScheduler turns a tensor into an array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SHAPE = (2, 4, 6, 3)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def network(z, t, library):
    return 0.6 * library.tanh(1.3 * z) + 0.3 * library.sin(2 * z + t / 150.0) - 0.1


def torch_network(z, t):
    return network(z, t, torch)


def jax_network(z, t):
    assert t.shape == z.shape[:1]
    return network(z, t[:, None, None, None], jnp)


def f_of(schedule):
    return lambda z, t: consistency_function(schedule, jax_network(z, t), z, t)


def denoise_of(schedule):
    return lambda z, t: schedule.to_x0_eps(jax_network(z, t), z, t)


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


# ---- grids


def test_the_trained_grid():
    grid = Schedule().grid(50)
    assert grid.dtype == np.int32
    assert (grid[0], grid[1], grid[-1], len(grid)) == (19, 39, 999, 50)


@pytest.mark.parametrize("total", [1000, 600])
@pytest.mark.parametrize("strength", [1.0, 0.58, 0.3])
@pytest.mark.parametrize("original", [50, 25, 33])
def test_lcm_timesteps_are_the_peers(original, strength, total):
    peer = diffusers.LCMScheduler(num_train_timesteps=total)
    most = int(original * strength)
    for steps in (1, 2, 3, 4, 5, 7, 8, most):
        if steps > most:
            continue
        peer.set_timesteps(steps, original_inference_steps=original, strength=strength)
        ours = sampling.lcm_timesteps(steps, Schedule(num_train_timesteps=total), original, strength)
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, peer.timesteps)


def test_four_steps():
    np.testing.assert_array_equal(sampling.lcm_timesteps(4, Schedule(), 50), [999, 759, 499, 259])
    np.testing.assert_array_equal(sampling.trailing_timesteps(4), [999, 749, 499, 249])


@pytest.mark.parametrize("total", [1000, 77])
def test_trailing_timesteps_are_the_peers(total):
    peer = diffusers.DDIMScheduler(num_train_timesteps=total, timestep_spacing="trailing")
    for steps in (1, 2, 3, 4, 7, 16, 50, 77):
        peer.set_timesteps(steps)
        np.testing.assert_array_equal(sampling.trailing_timesteps(steps, total), peer.timesteps)
    for steps in range(1, total + 1):
        assert len(sampling.check_timesteps(sampling.trailing_timesteps(steps, total), total)) == steps


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sampling.lcm_timesteps(0, Schedule(), 50), "steps is 0; it must be in 1 … 50"),
        (lambda: sampling.lcm_timesteps(51, Schedule(), 50), "steps is 51; it must be in 1 … 50"),
        (
            lambda: sampling.lcm_timesteps(16, Schedule(), 50, strength=0.3),
            r"steps is 16; it must be in 1 … 15 \(strength 0.3 of 50",
        ),
        (lambda: sampling.lcm_timesteps(1, Schedule(), 50, strength=0.01), "steps is 1; it must be in 1 … 0"),
        (lambda: sampling.lcm_timesteps(1, Schedule(), 50, strength=0.0), "strength is 0.0"),
        (lambda: sampling.lcm_timesteps(1, Schedule(), 50, strength=1.1), "strength is 1.1"),
        (lambda: sampling.lcm_timesteps(1, Schedule(), 1001), "original_steps is 1001; it must be in 1 … 1000"),
        (lambda: sampling.trailing_timesteps(0), "steps is 0; it must be in 1 … 1000"),
        (lambda: sampling.trailing_timesteps(1001), "steps is 1001"),
        (lambda: sampling.check_timesteps([]), "timesteps is empty"),
        (lambda: sampling.check_timesteps([999, 999]), "timesteps has 999 after 999; they must strictly decrease"),
        (lambda: sampling.check_timesteps([499, 999]), "strictly decrease"),
        (lambda: sampling.check_timesteps([1000, 3]), "timesteps has 1000; each must be in 0 … 999"),
        (lambda: sampling.check_timesteps([3, -1]), "timesteps has -1"),
        (lambda: sampling.check_timesteps([3.5, 1]), "whole numbers"),
        (lambda: sampling.check_timesteps([700], 600), "each must be in 0 … 599"),
    ],
)
def test_wrong_steps(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_right_timesteps_pass():
    checked = sampling.check_timesteps((np.int64(999), 400, 0))
    assert checked.dtype == np.int32
    np.testing.assert_array_equal(checked, [999, 400, 0])


# ---- consistency sampling


def peer_denoised(peer, z_T, noise, monkeypatch):
    """Returns `denoised` of each step of an LCMScheduler whose timesteps are set."""
    drawn = iter(noise)
    monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda shape, **_: torch.from_numpy(next(drawn)))
    z, denoised = torch.from_numpy(z_T), []
    for t in peer.timesteps:
        step = peer.step(torch_network(z, t), t, z)
        z = step.prev_sample
        denoised.append(step.denoised)
    assert next(drawn, None) is None
    return denoised


def check_trajectory(schedule, peer, timesteps, monkeypatch):
    """Sampling along the first j timesteps ends at diffusers' j-th prediction."""
    np.testing.assert_array_equal(timesteps, peer.timesteps)
    z_T, noise = normal(0, *SHAPE), normal(1, len(timesteps) - 1, *SHAPE)
    denoised = peer_denoised(peer, z_T, noise, monkeypatch)
    for j, theirs in enumerate(denoised):
        ours = sampling.consistency_sample(f_of(schedule), schedule, z_T, timesteps[: j + 1], noise[:j])
        assert_close(ours, theirs)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_consistency_sampling_is_the_peers(prediction_type, steps, monkeypatch):
    peer = diffusers.LCMScheduler(**BETAS, prediction_type=prediction_type)
    peer.set_timesteps(steps)
    schedule = read_schedule({**peer.config, "_class_name": "LCMScheduler"})
    check_trajectory(schedule, peer, sampling.lcm_timesteps(steps, Schedule(), 50), monkeypatch)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_consistency_sampling_along_own_timesteps(prediction_type, monkeypatch):
    peer = diffusers.LCMScheduler(**BETAS, prediction_type=prediction_type)
    peer.set_timesteps(timesteps=[999, 640, 639, 19, 0])
    own = sampling.check_timesteps([999, 640, 639, 19, 0])
    check_trajectory(Schedule(prediction_type=prediction_type), peer, own, monkeypatch)


def test_consistency_sampling_with_strength(monkeypatch):
    peer = diffusers.LCMScheduler(**BETAS, original_inference_steps=25)
    peer.set_timesteps(3, strength=0.5)
    check_trajectory(Schedule(), peer, sampling.lcm_timesteps(3, Schedule(), 25, strength=0.5), monkeypatch)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_consistency_sampling_from_zero_snr(prediction_type, monkeypatch):
    peer = diffusers.LCMScheduler(**BETAS, prediction_type=prediction_type, rescale_betas_zero_snr=True)
    peer.set_timesteps(4)
    schedule = Schedule(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    check_trajectory(schedule, peer, sampling.lcm_timesteps(4, Schedule(), 50), monkeypatch)


def test_noise_from_a_key():
    """A subkey for each step, none after the last: the same as injecting those draws."""
    schedule, z_T, timesteps = Schedule(), normal(0, *SHAPE), np.array([999, 499, 19])
    key = jax.random.key(3)
    drawn = sampling.consistency_sample(f_of(schedule), schedule, z_T, timesteps, key)
    noise = jnp.stack([jax.random.normal(k, SHAPE) for k in jax.random.split(key, 3)[:2]])
    injected = sampling.consistency_sample(f_of(schedule), schedule, z_T, timesteps, noise)
    np.testing.assert_allclose(drawn, injected, rtol=1e-5, atol=1e-5)
    other = sampling.consistency_sample(f_of(schedule), schedule, z_T, timesteps, jax.random.key(4))
    assert np.abs(drawn - other).max() > 0.1
    one = sampling.consistency_sample(f_of(schedule), schedule, z_T, timesteps[:1], key)
    np.testing.assert_allclose(one, f_of(schedule)(z_T, jnp.full(2, 999)), rtol=1e-5, atol=1e-5)


# ---- the diffusion model's own samplers


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 20, 50])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_ddim_is_the_peers(prediction_type, steps, to_one):
    # numbers of steps that divide 1,000: for others the step of diffusers from t ends beside its own next timestep
    config = {**BETAS, "prediction_type": prediction_type, "set_alpha_to_one": to_one, "clip_sample": False}
    peer = diffusers.DDIMScheduler(**config, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    z_T = normal(0, *SHAPE)
    z = torch.from_numpy(z_T)
    for t in peer.timesteps:
        z = peer.step(torch_network(z, t), t, z).prev_sample
    schedule = read_schedule({"_class_name": "DDIMScheduler", **config})
    ours = sampling.ddim_sample(denoise_of(schedule), schedule, z_T, sampling.trailing_timesteps(steps))
    assert_close(ours, z)


def peer_dpmpp(z_T, steps, **config):
    peer = diffusers.DPMSolverMultistepScheduler(**config, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    z = torch.from_numpy(z_T)
    for t in peer.timesteps:
        z = peer.step(torch_network(z, t), t, z).prev_sample
    return z


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_dpmpp_is_the_peers(prediction_type, steps):
    z_T = normal(0, *SHAPE)
    theirs = peer_dpmpp(z_T, steps, **BETAS, prediction_type=prediction_type)
    schedule = Schedule(prediction_type=prediction_type)
    ours = sampling.dpmpp_sample(denoise_of(schedule), schedule, z_T, sampling.trailing_timesteps(steps))
    assert_close(ours, theirs)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_samplers_from_zero_snr(prediction_type):
    """diffusers' DPM-Solver++ uses abar = 2^-24 in the network's conversion too, so the results are only close."""
    z_T, steps = normal(0, *SHAPE), sampling.trailing_timesteps(8)
    config = {**BETAS, "prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    schedule = Schedule(**config)
    ours = sampling.dpmpp_sample(denoise_of(schedule), schedule, z_T, steps)
    assert_close(ours, peer_dpmpp(z_T, 8, **config), tolerance=1e-3)
    peer = diffusers.DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False)
    peer.set_timesteps(8)
    z = torch.from_numpy(z_T)
    for t in peer.timesteps:
        z = peer.step(torch_network(z, t), t, z).prev_sample
    assert_close(sampling.ddim_sample(denoise_of(schedule), schedule, z_T, steps), z)


SAMPLERS = {
    "lcm": lambda schedule, z, t: sampling.consistency_sample(f_of(schedule), schedule, z, t, jax.random.key(0)),
    "ddim": lambda schedule, z, t: sampling.ddim_sample(denoise_of(schedule), schedule, z, t),
    "dpmpp": lambda schedule, z, t: sampling.dpmpp_sample(denoise_of(schedule), schedule, z, t),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_program_does_not_grow_with_the_steps(name):
    schedule, z = Schedule(), jnp.zeros(SHAPE)
    texts = [
        str(jax.make_jaxpr(lambda z, t: SAMPLERS[name](schedule, z, t))(z, sampling.trailing_timesteps(steps)))
        for steps in (4, 50)
    ]
    short, long = (text.count(" = ") for text in texts)
    assert short == long
    assert texts[0].count("tanh") == 1  # the network is in it once
    assert all("scan" in text for text in texts)


@pytest.mark.parametrize("name", SAMPLERS)
def test_timesteps_may_be_an_argument(name):
    """The jitted result with traced timesteps equals that with constant ones."""
    schedule, z_T, t = Schedule(), normal(0, *SHAPE), sampling.trailing_timesteps(4)
    constant = SAMPLERS[name](schedule, z_T, t)
    traced = jax.jit(lambda z, t: SAMPLERS[name](schedule, z, t))(z_T, t)
    np.testing.assert_allclose(traced, constant, rtol=1e-4, atol=1e-4)


def test_leading_timesteps_and_the_last_part():
    """diffusers' EulerDiscreteScheduler of SDXL, and the cut of its image-to-image pipeline."""
    peer = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    for steps in (1, 4, 30, 50, 999):
        peer.set_timesteps(steps)
        ours = sampling.leading_timesteps(steps, 1000, 1)
        assert ours.tolist() == peer.timesteps.tolist()
    assert sampling.last_part(sampling.leading_timesteps(4), 0.5).tolist() == [250, 0]
    assert len(sampling.last_part(np.arange(10)[::-1], 0.3)) == int(10 * 0.3)
    with pytest.raises(UserError, match="strength 0.3 leaves none of 2 steps; raise strength or steps"):
        sampling.last_part(np.asarray([999, 499]), 0.3)
    with pytest.raises(UserError, match="strength is 0; it must be above 0 and at most 1"):
        sampling.last_part(np.asarray([999]), 0)
    with pytest.raises(UserError, match="1000 steps with steps_offset 1 leave 0 … 999; take fewer"):
        sampling.leading_timesteps(1000, 1000, 1)
