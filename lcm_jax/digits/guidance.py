"""Which guidance suits a model best, chosen with noise and real pictures that no row of an evaluation has."""

import warnings
from collections.abc import Sequence

from lcm_jax.digits.classifier import Classifier
from lcm_jax.digits.draw import draw_all
from lcm_jax.digits.measures import SEED, real_pictures, score, validation_prompts
from lcm_jax.inference.pipeline import Pipeline
from lcm_jax.interop.recipe import RECIPE_FILE

VALIDATION_SEED = SEED + 2
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
WITHIN = 0.01  # of the best prompt accuracy; among those the Fréchet distance decides


def best_guidance(
    pipe: Pipeline,
    classifier: Classifier,
    steps: int,
    candidates: Sequence[float],
    sampler: str | None = None,
    style: str = "upright",
) -> float:
    """Returns the guidance_scale at which this model draws best in so many steps.

    Of the candidates whose prompt accuracy is within a percentage point of the best, it is the one of the smallest
    Fréchet distance to the real validation pictures.
    """
    if len(candidates) == 1:
        return candidates[0]
    prompts = validation_prompts()
    features, _ = classifier(real_pictures(prompts, "validation", style))
    scores = {}
    for guidance in candidates:
        images, _ = draw_all(pipe, prompts, steps, guidance, sampler, seed=VALIDATION_SEED)
        scores[guidance] = score(images, prompts, classifier, features)
    best = max(s.prompt.value for s in scores.values())
    good = {g: s.frechet for g, s in scores.items() if s.prompt.value >= best - WITHIN}
    return min(good, key=lambda g: good[g])


def trained_range(pipe: Pipeline) -> list[float]:
    """Returns the candidates that lie in the range that a consistency model was trained for.

    One without w-embedding has its guidance in its weights: 1 alone. One that does not say for which range it was
    trained keeps its own default.
    """
    if not pipe.has_w_embedding:
        return [pipe.default_guidance]
    if not pipe.recipe:
        warnings.warn(
            f"{pipe.folder.path} has no {RECIPE_FILE}, which tells for which guidance it was trained: "
            f"{pipe.default_guidance:g} is taken, as diffusers does; give --guidance_scale if that is wrong",
            UserWarning,
            stacklevel=2,
        )
        return [pipe.default_guidance]
    low, high = pipe.recipe.guidance_min, pipe.recipe.guidance_max
    return [g for g in GUIDANCE if low <= g <= high] or [pipe.default_guidance]
