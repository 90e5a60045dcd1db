"""Drawing a list of prompts with a model, each from its own fixed noise, and the time that it takes."""

import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from lcm_jax.digits.measures import SEED, Prompt, first_noise, later_noise
from lcm_jax.inference.pipeline import Pipeline

BATCH = 160  # pictures at once


def draw_all(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    steps: int,
    guidance_scale: float | None,
    sampler: str | None = None,
    *,
    fill: bool = False,
    seed: int = SEED,
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """Draws one picture for each prompt; that of prompt i starts from the noise i, whatever draws it.

    Args:
      guidance_scale: None for the pipeline's default.
      sampler: of a diffusion model, "ddim" or "dpmpp", or "lcm" with an LCM-LoRA.
      fill: draw more than is asked for in the last batch, so that it takes the program of a full one, which may be
        compiled already.
      seed: of the noise.

    Returns:
      The pictures, and images/s, the first batch (in which the program may be compiled) left out.
    """

    def batch(texts: list[str], z_T: np.ndarray, between: np.ndarray | None) -> np.ndarray:
        return pipe(texts, steps, guidance_scale, latents=z_T, noise=between, sampler=sampler)

    lcm_steps = steps if pipe.is_lcm or sampler == "lcm" else 0
    return in_batches(batch, prompts, pipe.latent_shape(1)[1:], lcm_steps, fill=fill, seed=seed)


Batch = Callable[[list[str], np.ndarray, np.ndarray | None], np.ndarray]


def in_batches(
    batch: Batch,
    prompts: Sequence[Prompt],
    shape: Sequence[int],
    lcm_steps: int,
    *,
    fill: bool = False,
    seed: int = SEED,
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """Calls `batch(texts, first noise, noise between the steps)` for up to BATCH prompts at a time.

    Args:
      shape: of one latent (h, w, C).
      lcm_steps: for how many steps of a consistency model noise is needed; 0: none.
      fill, seed: as in `draw_all`.

    Returns:
      As `draw_all`.
    """
    first = first_noise(len(prompts), shape, seed)
    later = later_noise(lcm_steps, len(prompts), shape, seed + 1) if lcm_steps else None
    numbers = list(range(len(prompts)))
    if fill:
        numbers += [0] * (-len(numbers) % BATCH)
    pictures, starts = [], []
    for start in range(0, len(numbers), BATCH):
        chosen = numbers[start : start + BATCH]
        starts.append(time.perf_counter())
        between = None if later is None else later[:, chosen]
        with warnings.catch_warnings():
            if pictures:
                warnings.simplefilter("ignore")  # the first batch has said it
            pictures.append(batch([prompts[i].text for i in chosen], first[chosen], between))
    seconds = time.perf_counter() - starts[min(1, len(starts) - 1)]
    timed = sum(len(part) for part in pictures[1:]) or len(pictures[0])
    return np.concatenate(pictures)[: len(prompts)], timed / seconds
