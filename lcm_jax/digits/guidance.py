"""Chooses a model's guidance scale on validation prompts, noise and images that the evaluation does not use."""

import warnings
from collections.abc import Sequence

from lcm_jax.digits.classifier import Classifier
from lcm_jax.digits.evaluation_set import SEED, real_images, validation_prompts
from lcm_jax.digits.measures import score
from lcm_jax.digits.sampling import sample_all
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.interop.recipe import RECIPE_FILE
from lcm_jax.monitor.progress import Sampling

VALIDATION_SEED = SEED + 2
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
WITHIN = 0.01  # tolerance below the best prompt accuracy; within it the Fréchet distance decides


def best_guidance(
    pipe: Pipeline,
    classifier: Classifier,
    steps: int,
    candidates: Sequence[float],
    sampler: str | None = None,
    style: str = "upright",
    progress: Sampling | None = None,
) -> float:
    """Returns the best of the candidate guidance scales for sampling in `steps` steps.

    Among the candidates whose prompt accuracy is within a percentage point of the best, it has the smallest Fréchet
    distance to the real validation images.
    """
    if len(candidates) == 1:
        return candidates[0]
    prompts = validation_prompts()
    features, _ = classifier(real_images(prompts, "validation", style))
    scores = {}
    for guidance in candidates:
        done = progress and progress.series(f"{steps} steps, trying guidance {guidance:g}", len(prompts), steps)
        images, _ = sample_all(pipe, prompts, steps, guidance, sampler, seed=VALIDATION_SEED, done=done)
        scores[guidance] = score(images, prompts, classifier, features)
    best = max(s.prompt.value for s in scores.values())
    good = {g: s.frechet for g, s in scores.items() if s.prompt.value >= best - WITHIN}
    return min(good, key=lambda g: good[g])


def work(steps: Sequence[int], candidates: Sequence[float], images: int) -> int:
    """Returns the network calls of `images` images for each number of steps, and of choosing the guidance for them."""
    choosing = len(candidates) * len(validation_prompts()) if len(candidates) > 1 else 0
    return sum(steps) * (images + choosing)


def trained_range(pipe: Pipeline) -> list[float]:
    """Returns the values of GUIDANCE in the range that a consistency model was trained for.

    Returns the pipeline's default guidance alone if no value is in the range, if the model has no recipe (with a
    warning), or if it has no w-embedding, since guidance is then part of its weights.
    """
    if not pipe.w_embedding_dim:
        return [pipe.default_guidance]
    if not pipe.recipe:
        warnings.warn(
            f"{pipe.folder.path} has no {RECIPE_FILE}, which records its guidance range: using "
            f"{pipe.default_guidance:g}, as diffusers does; if that is wrong, give --guidance-scale",
            UserWarning,
            stacklevel=2,
        )
        return [pipe.default_guidance]
    low, high = pipe.recipe.guidance_min, pipe.recipe.guidance_max
    return [g for g in GUIDANCE if low <= g <= high] or [pipe.default_guidance]
