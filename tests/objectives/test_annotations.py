"""Checks the declared shapes and dtypes of the formulas and losses at run time."""

import subprocess
import sys

PROGRAM = """
import jaxtyping

with jaxtyping.install_import_hook(["lcm_jax.diffusion", "lcm_jax.objectives"], "beartype.beartype"):
    from lcm_jax.diffusion import consistency, guidance, sampling
    from lcm_jax.diffusion.schedule import Schedule
    from lcm_jax.objectives import autoencoder, denoising, lcd

import jax
import jax.numpy as jnp

key, z = jax.random.key(0), jnp.ones((2, 4, 6, 3))
context, null = jnp.ones((2, 5, 7)), jnp.zeros((1, 5, 7))
network = lambda z, t, context, w=None: z * context.mean()

for schedule in (Schedule(), Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True)):
    for solver in ("ddim", "dpmpp") if schedule.rescale_betas_zero_snr else ("ddim", "dpm", "dpmpp"):
        config = lcd.LCDConfig(solver=solver, distance="l2")
        draws = lcd.draw(key, z.shape, config, 1000)
        lcd.lcd_loss(network, network, network, schedule, z, context, null, draws, config)
    config = denoising.DenoisingConfig(min_snr_gamma=5.0)
    draws = denoising.draw(key, z.shape, config, 1000)
    denoising.denoising_loss(network, schedule, z, context, null, draws, config)
    denoise = guidance.cfg_denoiser(network, schedule, context, null, jnp.ones(2))
    t = sampling.trailing_timesteps(3)
    sampling.ddim_sample(denoise, schedule, z, t)
    sampling.dpmpp_sample(denoise, schedule, z, jnp.asarray(t))
    f = lambda z, t: consistency.consistency_function(schedule, z, z, t)
    sampling.consistency_sample(f, schedule, z, t, key)
    sampling.consistency_sample(f, schedule, z, t, jnp.ones((2, *z.shape)))
autoencoder.autoencoder_loss(lambda x: (x, x), lambda z: z, z, z, autoencoder.AutoencoderConfig())

try:  # and a wrong one is noticed
    guidance.guide(z, z[:1], jnp.ones(2))
except jaxtyping.TypeCheckError:
    print("checked")
"""


def test_shapes_and_dtypes_are_as_declared():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "checked\n"
