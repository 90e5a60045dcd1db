"""LCM-LoRA of Stable Diffusion 1.5 (arXiv 2311.05556): 67.25 M parameters in 278 modules, the base stays as it is.

    python -m lcm_jax.train --config=configs/sd15_lora.py --workdir=runs/sd15_lora --config.data.directory=DIR

DIR is as in sd15.py. The numbers are those of diffusers' example for LCM-LoRA of this model.
"""

import sd15  # a config file sees its neighbours


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; sd15_lora.py has none")
    config = sd15.get_config()
    config.lora.rank = 64
    config.steps = 10_000
    config.batch_size = 96
    config.optimizer.learning_rate = 1e-4
    config.lcd.w_embedding_dim = 0  # a LoRA file has no place for it
    config.lcd.guidance_min = 6.0  # w in [5, 15]; the adapters learn the average
    config.lcd.guidance_max = 16.0
    config.ema.decay = 0.0  # the target is the student itself, its gradient stopped
    config.log.guidance_scale = 1.0
    config.checkpoint.keep_every = 2_000
    return config
