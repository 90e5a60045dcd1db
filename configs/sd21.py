"""Stable Diffusion 2.1 (v-prediction) to a latent consistency model at 768 px; `:denoising` trains it as it is.

    python -m lcm_jax.train --config=configs/sd21.py --workdir=runs/sd21 --config.data.directory=DIR
    python -m lcm_jax.train --config=configs/sd21.py:denoising --workdir=runs/sd21 --config.data.directory=DIR

DIR is a prepared TFDS ArrayRecord folder of images and captions. Values are the LCM paper's (arXiv 2310.04378) for
its 768 px model, whose teacher was a v-prediction model too. `:denoising` is plain diffusion training at 512 px, for a
UNet of your own data, or a teacher.
"""

import sd15  # a config file sees its neighbours

from lcm_jax.config import default_config


def get_config(variant=""):
    if variant not in ("", "denoising"):
        raise ValueError(f"no variant {variant!r}; sd21.py has :denoising")
    config = sd15.get_config()
    config.model.folder = "stabilityai/stable-diffusion-2-1"
    config.data.image_size = 768
    config.batch_size = 16  # paper, 768 px
    if variant == "denoising":
        config.objective = "denoising"
        config.lcd = default_config().lcd
        config.data.image_size = 512
        config.batch_size = 256
        config.optimizer.learning_rate = 1e-5
        config.ema.decay = 0.9999
        config.log.sample_steps = 50
    return config
