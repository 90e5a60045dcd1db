"""Stable Diffusion 1.5 to a latent consistency model at 512 px: the recipe of the LCM paper (arXiv 2310.04378).

    python -m lcm_jax.train --config=configs/sd15.py --workdir=runs/sd15 --config.data.directory=DIR

DIR is a prepared TFDS ArrayRecord folder of images and captions. The paper took LAION-Aesthetics-6+ at 512 px for
100,000 iterations on 8 A100 GPUs.
"""

from lcm_jax.config import default_config


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; sd15.py has none")
    config = default_config()
    config.objective = "lcd"
    config.model.folder = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    config.model.dtype = "bfloat16"
    config.model.remat = "block"
    config.data.directory = "data/captioned_images"
    config.data.image_size = 512
    config.data.crop = "center"
    config.steps = 100_000  # paper, section 5
    config.batch_size = 72  # paper, 512 px
    config.optimizer.learning_rate = 8e-6  # paper
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 1e-2  # diffusers' LCM scripts
    config.optimizer.clip_norm = 1.0  # diffusers' LCM scripts
    config.ema.decay = 0.999943  # paper
    config.lcd.skip = 20  # paper, section 4.3: k = 20 of 1,000 timesteps
    config.lcd.solver = "ddim"  # paper
    config.lcd.guidance_min = 3.0  # paper: w in [2, 14]; guidance_scale is w + 1
    config.lcd.guidance_max = 15.0
    config.lcd.distance = "huber"  # diffusers' LCM scripts: pseudo-Huber, c = 1e-3
    config.lcd.huber_c = 1e-3
    config.checkpoint.every = 1000
    config.checkpoint.keep_last = 3
    config.checkpoint.keep_every = 20_000
    config.log.every = 50
    config.log.samples_every = 1000
    config.log.prompts = (
        "a photograph of an astronaut riding a horse",
        "a close-up portrait of an old fisherman, natural light",
        "a bowl of ripe peaches on a wooden table",
        "a lighthouse on a cliff in a storm, oil painting",
    )
    return config
