"""Schedules against diffusers', the time between two timesteps, and the three prediction types."""

import dataclasses
import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lcm_jax.diffusion.schedule import BETA_SCHEDULES, PREDICTION_TYPES, Schedule
from lcm_jax.errors import UserError
from lcm_jax.host import json_file
from lcm_jax.interop.scheduler import KNOWN, SCHEDULER_CLASSES, read_schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("T", [1000, 200])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_cumprod_are_the_peers(beta_schedule, zero_snr, T):
    peer = diffusers.DDIMScheduler(
        num_train_timesteps=T,
        beta_start=0.001,
        beta_end=0.015,
        beta_schedule=beta_schedule,
        rescale_betas_zero_snr=zero_snr,
        prediction_type="v_prediction",
        clip_sample=False,
    )
    ours = read_schedule({"_class_name": "DDIMScheduler", **peer.config})
    # the cumulative product in diffusers is float32
    np.testing.assert_allclose(ours.alphas_cumprod, peer.alphas_cumprod, rtol=2e-4, atol=2e-7)
    assert ours.alphas_cumprod.shape == (T,)
    assert (np.diff(ours.alphas_cumprod) < 0).all()
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_a_missing_key_means_what_it_means_to_the_class(name):
    peer = inspect.signature(getattr(diffusers, name)).parameters
    ours = read_schedule({"_class_name": name, "clip_sample": False})
    for field in dataclasses.fields(Schedule):
        if field.name in peer:
            assert getattr(ours, field.name) == peer[field.name].default, field.name
    assert {"beta_start", "beta_schedule", "prediction_type"} <= peer.keys()


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # torch and numpy, in diffusers
@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_what_diffusers_saves_is_read(name, tmp_path):
    """With all defaults that its class writes, such as the -Infinity of DPM-Solver's classes."""
    peer = getattr(diffusers, name)(**SD)
    peer.save_pretrained(tmp_path)
    ours = read_schedule(json_file.read(tmp_path / "scheduler_config.json"))
    np.testing.assert_allclose(ours.alphas_cumprod, peer.alphas_cumprod, rtol=2e-4)


def test_no_offset_is_none_of_the_schedule():
    config = {"_class_name": "DDIMScheduler", **SD, "steps_offset": None}
    assert read_schedule(config) == read_schedule({**config, "steps_offset": 0})


def test_missing_keys_differ_between_classes():
    ddim = read_schedule({"_class_name": "DDIMScheduler", "clip_sample": False})
    lcm = read_schedule({"_class_name": "LCMScheduler"})
    assert (ddim.beta_start, ddim.beta_schedule) == (0.0001, "linear")
    assert (lcm.beta_start, lcm.beta_schedule) == (0.00085, "scaled_linear")


@pytest.mark.parametrize(("to_one", "final"), [(True, lambda peer: 1.0), (False, lambda peer: peer.alphas_cumprod[0])])
def test_where_ddim_ends(to_one, final):
    peer = diffusers.DDIMScheduler(**SD, set_alpha_to_one=to_one, clip_sample=False)
    ours = read_schedule({"_class_name": "DDIMScheduler", **peer.config})
    np.testing.assert_allclose(ours.final_alpha_cumprod, final(peer), rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name is 'FlowMatch"),
        (
            {"_class_name": "TCDScheduler"},
            "_class_name is 'TCDScheduler'; supported, each with Scheduler behind: DDIMParallel, ",
        ),
        ({"_class_name": ["diffusers", "DDIMScheduler"]}, r"_class_name is \['diffusers'"),
        ({"thresholding": True}, "thresholding is True"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"num_train_timesteps": 1000.0}, "num_train_timesteps is 1000.0"),
        ({"num_train_timesteps": 10**11}, "num_train_timesteps is 100000000000"),
        ({"num_train_timesteps": 10**7}, "num_train_timesteps is 10000000"),
        ({"num_train_timesteps": None}, "num_train_timesteps is None"),
        ({"num_train_timesteps": 10**5}, "beta_end 0.012 and num_train_timesteps 100000 give an unusable"),
        ({"beta_start": 1e-20}, "beta_start 1e-20, .*: .* must start below 1, strictly decrease, and stay above"),
        ({"beta_start": "0.00085"}, "beta_start is '0.00085'; supported: a positive number"),
        ({"beta_start": [0.1]}, r"beta_start is \[0.1\]; supported: a positive number"),
        ({"beta_end": None}, "beta_end is None; supported: a positive number"),
        ({"steps_offset": "1"}, "steps_offset is '1'; supported: a whole number"),
        ({"set_alpha_to_one": "false"}, "set_alpha_to_one is 'false'; supported: true, false, or null"),
        ({"beta_schedule": ["linear"]}, r"beta_schedule is \['linear'\]; supported: a text"),
        ({"predict_epsilon": False}, "predict_epsilon is False"),
        ({"original_inference_steps": None}, "original_inference_steps is None; supported: a positive whole number"),
        ({"original_inference_steps": 0}, "original_inference_steps is 0; supported: a positive whole number"),
        ({"original_inference_steps": "50"}, "original_inference_steps is '50'; supported: a positive whole number"),
        ({"original_inference_steps": 2000}, "original_inference_steps is 2000, more than num_train_timesteps, 1000"),
        ({"num_train_timesteps": 20}, "original_inference_steps is 50, more than num_train_timesteps, 20"),
        ({"timestep_scaling": None}, "timestep_scaling is None; supported: a positive number"),
        ({"timestep_scaling": 0}, "timestep_scaling is 0; supported: a positive number"),
        ({"beta_start": 0.0}, "beta_start is 0.0"),
        ({"beta_start": 0.02}, "beta_start is 0.02"),  # above beta_end
        ({"beta_end": 1.0}, "beta_end 1.0"),
        ({"rescale_betas_zero_snr": True}, "prediction_type is 'epsilon' with rescale_betas_zero_snr"),
    ],
)
def test_what_is_not_supported_is_named(config, named):
    with pytest.raises(UserError, match=named) as error:
        read_schedule({"_class_name": "LCMScheduler", **config})
    assert "\n" not in str(error.value)
    assert "_class_name" not in config or "did you mean" not in str(error.value)  # it would sample in another way


@pytest.mark.parametrize("name", SCHEDULER_CLASSES)
def test_all_keys_of_diffusers_are_known(name):
    assert set(inspect.signature(getattr(diffusers, name)).parameters) <= KNOWN


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"])
@pytest.mark.parametrize(
    "off", [{}, {"clip_sample": True}, {"thresholding": None, "rescale_betas_zero_snr": None}], ids=str
)
def test_clipping_is_no_part_of_a_schedule_and_null_is_off(name, off):
    assert read_schedule({"_class_name": name, **SD, **off}) == read_schedule(
        {"_class_name": name, **SD, "clip_sample": False}
    )


def test_a_config_without_a_class_is_refused():
    with pytest.raises(UserError, match="_class_name is missing"):
        read_schedule(SD)


# ---- time


def test_time_of_inverts_log_snr():
    schedule = Schedule()
    t = np.arange(1000)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule.time_of(schedule.log_snr(t)), t, atol=1e-8)
        between = np.random.default_rng(0).uniform(0, 999, 500)
        np.testing.assert_allclose(schedule.time_of(schedule.log_snr(between)), between, atol=1e-8)
    np.testing.assert_allclose(schedule.time_of(schedule.log_snr(t)), t, atol=2e-3)  # float32


def test_the_middle_of_a_step_is_between_timesteps():
    schedule = Schedule()
    middle = (schedule.log_snr(jnp.array([19])) + schedule.log_snr(jnp.array([0]))) / 2
    assert schedule.time_of(middle)[0] == pytest.approx(3.6, abs=0.05)


def test_log_alpha_is_linear_between_timesteps():
    schedule = Schedule()
    ends = np.log(schedule.alphas_cumprod[[3, 4, 998, 999]]) / 2
    expected = np.exp([0.4 * ends[0] + 0.6 * ends[1], 0.75 * ends[2] + 0.25 * ends[3]])
    t = jnp.array([3.6, 998.25])
    np.testing.assert_allclose(schedule.alpha(t), expected, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - expected**2), rtol=1e-5)
    np.testing.assert_allclose(schedule.log_snr(t), np.log(expected / np.sqrt(1 - expected**2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["alpha", "sigma", "log_snr"])
def test_a_whole_time_is_a_timestep(method):
    function = getattr(Schedule(), method)
    t = np.arange(1000)
    np.testing.assert_allclose(function(jnp.float32(t)), function(t), rtol=3e-5, atol=3e-6)


def test_alpha_sigma_and_log_snr_of_a_timestep():
    schedule = Schedule()
    peer = diffusers.LCMScheduler(**SD)
    abar, t = peer.alphas_cumprod.double().numpy(), np.array([0, 19, 500, 999])
    np.testing.assert_allclose(schedule.alpha(t), np.sqrt(abar[t]), rtol=1e-5)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1 - abar[t]), rtol=2e-5)
    np.testing.assert_allclose(schedule.log_snr(t), 0.5 * np.log(abar[t] / (1 - abar[t])), rtol=2e-5, atol=1e-5)
    assert schedule.alpha(t).dtype == jnp.float32


def test_at_zero_terminal_snr_only_the_log_is_bounded():
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    last = jnp.array([999])
    assert schedule.alpha(last)[0] == 0
    assert schedule.sigma(last)[0] == 1
    np.testing.assert_allclose(schedule.log_snr(last), -12 * np.log(2), rtol=1e-6)


# ---- prediction types


def draws(seed=0):
    x0, eps = np.random.default_rng(seed).standard_normal((2, 5, 4, 4, 3)).astype("float32")
    return x0, eps, np.array([0, 1, 19, 500, 999])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_perfect_output_gives_back_x0_and_eps(prediction_type):
    schedule = Schedule(prediction_type=prediction_type)
    x0, eps, t = draws()
    z = schedule.add_noise(x0, eps, t)
    x0_back, eps_back = schedule.to_x0_eps(schedule.target(x0, eps, t), z, t)
    np.testing.assert_allclose(x0_back, x0, atol=2e-5)  # float32 loses a factor alpha / sigma at either end
    np.testing.assert_allclose(eps_back, eps, atol=2e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_and_targets_are_the_peers(prediction_type):
    x0, eps, t = draws(1)
    peer = diffusers.DDPMScheduler(**SD)
    schedule = Schedule(prediction_type=prediction_type)
    tensors = torch.tensor(x0), torch.tensor(eps), torch.tensor(t)
    np.testing.assert_allclose(schedule.add_noise(x0, eps, t), peer.add_noise(*tensors), rtol=1e-5, atol=1e-5)
    target = {"epsilon": eps, "v_prediction": peer.get_velocity(*tensors), "sample": x0}[prediction_type]
    np.testing.assert_allclose(schedule.target(x0, eps, t), target, rtol=1e-5, atol=1e-5)


def test_one_time_for_all_samples():
    x0, eps, _ = draws(2)
    schedule = Schedule(prediction_type="v_prediction")
    each, all_ = np.full(5, 300), np.int32(300)
    np.testing.assert_array_equal(schedule.add_noise(x0, eps, all_), schedule.add_noise(x0, eps, each))
    for one, many in zip(schedule.to_x0_eps(eps, x0, all_), schedule.to_x0_eps(eps, x0, each), strict=True):
        np.testing.assert_array_equal(one, many)
