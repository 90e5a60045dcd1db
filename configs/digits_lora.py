"""LCM-LoRA of the digits teacher: adapters with which it, and what was fine-tuned from it, draws in few steps.

python -m lcm_jax.train --config=configs/digits_lora.py --workdir=runs/lora/lcm
"""

import digits  # a config file sees its neighbours


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; digits_lora.py has none")
    config = digits.get_config()
    config.lora.rank = 32
    config.optimizer.learning_rate = 1e-3
    config.lcd.w_embedding_dim = 0  # a LoRA file has no place for it
    config.lcd.guidance_min = 5.0  # it goes into the weights; four steps want more of it than the teacher's 3
    config.lcd.guidance_max = 5.0
    config.log.guidance_scale = 1.0
    return config
