"""Stable Diffusion 2.1 (v-prediction) to a latent consistency model at 768 px.

    python -m lcm_jax.train --config=configs/sd21.py --workdir=runs/sd21 --config.data.directory=DIR

DIR is a prepared TFDS ArrayRecord folder of images and captions. Values are the LCM paper's (arXiv 2310.04378) for
its 768 px model, whose teacher was a v-prediction model too.
"""

import sd15  # a config file sees its neighbours


def get_config(variant=""):
    config = sd15.get_config(variant)
    config.model.folder = "stabilityai/stable-diffusion-2-1"
    config.data.image_size = 768
    config.batch_size = 16  # paper, 768 px
    return config
