"""The demo: the digits teacher (lcm_jax/assets/digits_teacher) to a model that draws in one to four steps.

python -m lcm_jax.train --config=configs/digits.py --workdir=runs/digits      # minutes on two cores
python -m lcm_jax.train --config=configs/digits.py:full --workdir=runs/full   # seven times as long
python -m lcm_jax.train --config=configs/digits.py:smoke --workdir=runs/smoke # a minute or two: does it run here?
"""

import pathlib

import lcm_jax
from lcm_jax.config import default_config

TEACHER = str(pathlib.Path(lcm_jax.__file__).parent / "assets" / "digits_teacher")
PROMPTS = (
    "a red seven on a blue background",
    "a white three on a black background",
    "a yellow five on a green background",
    "a black zero on a cyan background",
    "a magenta nine on a white background",
    "a green two on a yellow background",
    "a blue eight on a white background",
    "a cyan four on a red background",
)


def get_config(variant=""):
    if variant not in ("", "full", "smoke"):
        raise ValueError(f"no variant {variant!r}; digits.py has :full and :smoke")
    config = default_config()
    config.objective = "lcd"
    config.model.folder = TEACHER
    config.data.dataset = "captioned_digits"
    config.data.data_dir = "data"
    config.data.image_size = 32
    config.mesh.cpu_devices = 2
    config.steps = 1200
    config.batch_size = 32
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.decay = "cosine"
    config.ema.decay = 0.95
    config.lcd.guidance_min = 1.0
    config.lcd.guidance_max = 4.0
    config.checkpoint.every = 100
    config.log.every = 5
    config.log.samples_every = 200
    config.log.prompts = PROMPTS
    config.log.guidance_scale = 2.5
    if variant == "full":
        config.steps = 8_000
        config.checkpoint.every = 500
        config.log.every = 20
        config.log.samples_every = 1000
    if variant == "smoke":
        config.steps = 4
        config.batch_size = 8
        config.checkpoint.every = 2
        config.log.every = 1
        config.log.samples_every = 4
        config.log.prompts = PROMPTS[:2]
    return config
