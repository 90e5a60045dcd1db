"""Samples one image per prompt from fixed noise, and measures the speed."""

import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8

from lcm_jax.digits.evaluation_set import SEED, Prompt, first_noise, later_noise
from lcm_jax.inference.pipeline import Pipeline

BATCH = 160  # images per call
Done = Callable[[int], None]


def sample_all(
    pipe: Pipeline,
    prompts: Sequence[Prompt],
    steps: int,
    guidance_scale: float | None,
    sampler: str | None = None,
    *,
    fill: bool = False,
    seed: int = SEED,
    done: Done | None = None,
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """Samples one image per prompt. Prompt i starts from noise i with every model and batch size.

    Args:
      guidance_scale: None for the pipeline's default.
      sampler: for a diffusion model: "ddim", "dpmpp", or "lcm" with an LCM-LoRA.
      fill: whether to pad the last batch to BATCH, to reuse the compiled program of a full batch.
      seed: seed of the noise.
      done: called after each batch with the number of images that are done.

    Returns:
      The images, and images/s without the first batch, which may include compilation.
    """

    def batch(texts: list[str], z_T: np.ndarray, between: np.ndarray | None) -> np.ndarray:
        given = {"latents": z_T, "noise": between, "sampler": sampler, "batch_size": len(texts)}
        return pipe(texts, steps, guidance_scale, **given)

    lcm_steps = steps if pipe.is_lcm or sampler == "lcm" else 0
    return in_batches(batch, prompts, pipe.latent_shape(1)[1:], lcm_steps, fill=fill, seed=seed, done=done)


Batch = Callable[[list[str], np.ndarray, np.ndarray | None], np.ndarray]


def in_batches(
    batch: Batch,
    prompts: Sequence[Prompt],
    shape: Sequence[int],
    lcm_steps: int,
    *,
    fill: bool = False,
    seed: int = SEED,
    done: Done | None = None,
) -> tuple[UInt8[np.ndarray, "n h w 3"], float]:
    """Calls `batch(texts, initial noise, noise between the steps)` for up to BATCH prompts at a time.

    Args:
      shape: shape of one latent (h, w, C).
      lcm_steps: number of consistency sampling steps that need noise between them; 0 for other samplers.
      fill, seed, done: as in `sample_all`.

    Returns:
      As `sample_all`; the first batch is timed if it is the only one.
    """
    first = first_noise(len(prompts), shape, seed)
    later = later_noise(lcm_steps, len(prompts), shape, seed + 1) if lcm_steps else None
    numbers = list(range(len(prompts)))
    if fill:
        numbers += [0] * (-len(numbers) % BATCH)
    images, starts = [], []
    for start in range(0, len(numbers), BATCH):
        chosen = numbers[start : start + BATCH]
        starts.append(time.perf_counter())
        between = None if later is None else later[:, chosen]
        with warnings.catch_warnings():
            if images:
                warnings.simplefilter("ignore")  # the first batch has issued them
            images.append(batch([prompts[i].text for i in chosen], first[chosen], between))
        if done:
            done(min(start + BATCH, len(prompts)))
    seconds = time.perf_counter() - starts[min(1, len(starts) - 1)]
    timed = sum(len(part) for part in images[1:]) or len(images[0])
    return np.concatenate(images)[: len(prompts)], timed / seconds
