"""The digits teacher: a latent diffusion model in Stable Diffusion's own shape, trained from nothing (`make teacher`).

:vae    the autoencoder, 32 x 32 pixels to 8 x 8 x 4 latents; starts from the folder of `lcm_jax.blank`
(none)  UNet and text encoder together; starts from the folder that the autoencoder's run was exported to

python -m lcm_jax.train --config=configs/digits_teacher.py:vae --workdir=runs/teacher/vae --config.model.folder=…
"""

import digits  # a config file sees its neighbours

from lcm_jax.config import default_config


def get_config(variant=""):
    if variant not in ("", "vae"):
        raise ValueError(f"no variant {variant!r}; digits_teacher.py has :vae")
    config = default_config()
    config.data.dataset = "captioned_digits"
    config.data.data_dir = "data"
    config.data.image_size = 32
    config.log.prompts = digits.PROMPTS
    config.mesh.cpu_devices = 2
    if variant == "vae":
        config.objective = "autoencoder"
        config.autoencoder.kl_weight = 2.56e-4
        # Noise drowns a small image sooner than a large one: at 8 x 8 latents of unit deviation, four DDIM steps are
        # as good as fifty. Latents of deviation 4 have the signal, summed over an image, that SD's 64 x 64 have.
        config.autoencoder.latent_std = 4.0
        config.model.folder = "runs/teacher/blank"
        config.steps = 2500
        config.batch_size = 32
        config.optimizer.learning_rate = 2e-3
        config.optimizer.warmup_steps = 50
        config.optimizer.decay = "cosine"
        config.ema.decay = 0.99
        config.ema.warmup = True
        config.checkpoint.every = 500
        config.log.samples_every = 500
        return config
    config.objective = "denoising"
    config.model.folder = "runs/teacher/with_vae"
    config.denoising.train_text_encoder = True
    config.denoising.timestep_shift = 6.0  # the digit is decided in the noisiest twentieth of the timesteps
    config.steps = 8000
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.decay = "cosine"
    config.ema.decay = 0.999
    config.ema.warmup = True
    config.checkpoint.every = 1000
    config.log.every = 20
    config.log.samples_every = 1000
    config.log.sample_steps = 20
    config.log.guidance_scale = 3.0
    return config
