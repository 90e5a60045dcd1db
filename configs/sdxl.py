"""Stable Diffusion XL to a latent consistency model at 1,024 px.

    python -m lcm_jax.train --config=configs/sdxl.py --workdir=runs/sdxl --config.data.directory=DIR

DIR is as in sd15.py; the original size and the crop of each image are inputs of the model. Values marked "example" are
those of diffusers' example for this model, which illustrates: no run of this length was published.
"""

import sd15  # a config file sees its neighbours


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; sdxl.py has none")
    config = sd15.get_config()
    config.model.folder = "stabilityai/stable-diffusion-xl-base-1.0"
    config.model.remat = "layer"  # one of its blocks is half of the network
    config.data.image_size = 1024
    config.data.crop = "random"  # its top and left are an input (SDXL, arXiv 2307.01952, section 2.2)
    config.steps = 1_000  # example
    config.batch_size = 96  # example: 12 for each GPU; here of 8 GPUs
    config.optimizer.learning_rate = 1e-6  # example
    config.optimizer.warmup_steps = 500  # example
    config.optimizer.weight_decay = 0.0  # example
    config.optimizer.clip_norm = 1.0  # example
    config.ema.decay = 0.95  # example
    config.lcd.guidance_min = 4.0  # example: w in [3, 15]; guidance_scale is w + 1
    config.lcd.guidance_max = 16.0
    config.lcd.skip = 20  # example: 50 DDIM steps
    config.lcd.distance = "huber"  # example, c = 1e-3
    config.lcd.huber_c = 1e-3
    config.checkpoint.every = 200  # example
    config.checkpoint.keep_every = 1_000
    config.log.samples_every = 200  # example
    return config
