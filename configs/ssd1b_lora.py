"""LCM-LoRA of SSD-1B, SDXL with half of its weights (arXiv 2401.02677): 104.90 M parameters in 423 modules.

    python -m lcm_jax.train --config=configs/ssd1b_lora.py --workdir=runs/ssd1b_lora --config.data.directory=DIR

DIR is as in sdxl.py. Rank and modules are the published LCM-LoRA's (arXiv 2311.05556); no other number of its training
was published, so they are those of sdxl_lora.py.
"""

import sdxl_lora  # a config file sees its neighbours


def get_config(variant=""):
    if variant:
        raise ValueError(f"no variant {variant!r}; ssd1b_lora.py has none")
    config = sdxl_lora.get_config()
    config.model.folder = "segmind/SSD-1B"
    return config
