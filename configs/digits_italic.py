"""The digits teacher in another style, italic digits, by plain diffusion training: what an LCM-LoRA is carried to.

(none)   a fine-tune of all weights of the UNet
:lora    the style as a LoRA

python -m lcm_jax.train --config=configs/digits_italic.py --workdir=runs/lora/italic
"""

import digits  # a config file sees its neighbours

from lcm_jax.config import default_config


def get_config(variant=""):
    if variant not in ("", "lora"):
        raise ValueError(f"no variant {variant!r}; digits_italic.py has :lora")
    config = default_config()
    config.objective = "denoising"
    config.model.folder = digits.TEACHER
    config.data.dataset = "italic_digits"
    config.data.data_dir = "data"
    config.data.image_size = 32
    config.mesh.cpu_devices = 2
    config.steps = 1200
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 20
    config.optimizer.decay = "cosine"
    config.denoising.timestep_shift = 6.0  # as the teacher was trained
    config.ema.decay = 0.99
    config.checkpoint.every = 200
    config.log.every = 10
    config.log.samples_every = 400
    config.log.prompts = digits.PROMPTS
    config.log.sample_steps = 20
    config.log.guidance_scale = 3.0
    if variant == "lora":
        config.lora.rank = 32
    return config
