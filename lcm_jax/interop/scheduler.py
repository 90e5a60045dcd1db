"""Reads diffusers' scheduler_config.json: supported classes and values, and defaults for missing keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcm_jax.diffusion.schedule import Schedule
from lcm_jax.errors import UserError, plain
from lcm_jax.host import json_file

# defaults of diffusers' scheduler classes
_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "original_inference_steps": 1,  # only LCMScheduler has a trained grid
}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
SCHEDULER_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMParallelScheduler": {},
    "DDIMScheduler": {},
    "DDPMParallelScheduler": {},
    "DDPMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": _LATENT,
    "KDPM2AncestralDiscreteScheduler": _LATENT,
    "KDPM2DiscreteScheduler": _LATENT,
    "LCMScheduler": {**_LATENT, "beta_schedule": "scaled_linear", "original_inference_steps": 50},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"set_alpha_to_one": False},
    "UniPCMultistepScheduler": {},
}
_OFF = json_file.Kind("False", lambda value: value in (None, False))
_SWITCH = json_file.or_none(json_file.BOOLEAN)  # null means off, as in diffusers
KINDS: dict[str, json_file.Kind] = {
    "num_train_timesteps": json_file.WHOLE,
    "beta_start": json_file.POSITIVE,
    "beta_end": json_file.POSITIVE,
    "beta_schedule": json_file.TEXT,
    "rescale_betas_zero_snr": _SWITCH,
    "prediction_type": json_file.TEXT,
    "set_alpha_to_one": _SWITCH,
    "steps_offset": json_file.or_none(json_file.INTEGER),  # diffusers' pipelines replace null by 1
    # LCMScheduler's trained grid
    "original_inference_steps": json_file.WHOLE,
    "timestep_scaling": json_file.POSITIVE,
    # options that change the diffusion process: only these values are implemented
    "thresholding": _OFF,
    "trained_betas": json_file.Kind("None", lambda value: value is None),
    "use_flow_sigmas": _OFF,
    "use_dynamic_shifting": _OFF,
    "timestep_type": json_file.Kind("'discrete'", lambda value: value == "discrete"),
    "predict_epsilon": json_file.Kind("True", lambda value: value in (None, True)),  # older form of prediction_type
}
# Ignored keys of diffusers' classes: options of its solvers and timesteps, which are not used here, and clipping, which
# `StableDiffusionPipeline` always turns off, since latents are not in [-1, 1].
_OTHERS = (
    "algorithm_type clip_sample clip_sample_range disable_corrector dynamic_thresholding_ratio euler_at_final "
    "final_sigmas_type flow_shift interpolation_type lambda_min_clipped lower_order_final predict_x0 sample_max_value "
    "shift_terminal sigma_max sigma_min skip_prk_steps solver_order solver_p solver_type tensor_format "
    "time_shift_type timestep_spacing timestep_values use_beta_sigmas use_exponential_sigmas use_karras_sigmas "
    "use_lu_lambdas variance_type"
)
KNOWN = frozenset((*KINDS, *_OTHERS.split()))


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """Returns the noise schedule of a scheduler_config.json; missing keys get the defaults of its `_class_name`.

    Raises:
      UserError: the class or a value isn't supported.
    """
    values = read_values(config)
    schedule = Schedule(**{field.name: values[field.name] for field in dataclasses.fields(Schedule)})
    if (grid := values["original_inference_steps"]) > schedule.num_train_timesteps:
        raise UserError(
            f"original_inference_steps is {grid}, more than num_train_timesteps, {schedule.num_train_timesteps}"
        )
    return schedule


def read_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of a scheduler_config.json, with the defaults of its `_class_name` for missing keys.

    Raises:
      UserError: the class or a value isn't supported.
    """
    name = config.get("_class_name")
    if name is None:
        raise UserError("_class_name is missing; it must name diffusers' scheduler class, like 'DDIMScheduler'")
    if not isinstance(name, str) or name not in SCHEDULER_CLASSES:
        # suggest no similar name: another class samples differently
        names = ", ".join(known.removesuffix("Scheduler") for known in SCHEDULER_CLASSES)
        raise UserError(f"_class_name is {plain(repr(name), 60)}; supported, each with Scheduler behind: {names}")
    for key, kind in KINDS.items():
        if key in config:
            kind.check(key, config[key])
    values = {**_DEFAULTS, **SCHEDULER_CLASSES[name], **config}
    values["steps_offset"] = values["steps_offset"] or 0
    return {**values, **{key: bool(values[key]) for key in ("rescale_betas_zero_snr", "set_alpha_to_one")}}
