"""LCM-LoRA of Stable Diffusion XL (arXiv 2311.05556): 196.75 M parameters in 788 modules, the base stays as it is.

    python -m lcm_jax.train --config=configs/sdxl_lora.py --workdir=runs/sdxl_lora --config.data.directory=DIR

DIR is as in sdxl.py. Rank and modules are the published LCM-LoRA's, the other numbers those of diffusers' example.
"""

import sdxl  # a config file sees its neighbours


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; sdxl_lora.py has none")
    config = sdxl.get_config()
    config.lora.rank = 64
    config.optimizer.learning_rate = 1e-4
    config.lcd.w_embedding_dim = 0  # a LoRA file has no place for it; w in [3, 15], the adapters learn the average
    config.ema.decay = 0.0  # the target is the student itself, its gradient stopped
    config.log.guidance_scale = 1.0
    return config
