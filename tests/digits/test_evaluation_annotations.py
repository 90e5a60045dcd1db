"""Checks the declared shapes and dtypes of the evaluation at run time."""

import jaxtyping
import numpy as np
import pytest
from beartype import beartype

from lcm_jax.digits import colours, evaluation_set, measures, sampling, sheet
from lcm_jax.digits.classifier import Classifier
from lcm_jax.evaluation import frechet

PROMPTS = evaluation_set.test_prompts()[:3]


def checked(function):
    return jaxtyping.jaxtyped(typechecker=beartype)(function)


def test_shapes_and_dtypes_are_as_declared(classifier):
    images = checked(evaluation_set.real_images)(PROMPTS, "test")
    checked(colours.read_colours)(images)
    features, _ = checked(Classifier.__call__)(classifier, images)
    checked(frechet.frechet_distance)(features, features[:2])
    checked(measures.score)(images, PROMPTS, classifier, features)
    checked(evaluation_set.first_noise)(3, (2, 4, 1), 0)
    checked(evaluation_set.later_noise)(3, 2, (2, 4, 1), 1)
    checked(sheet.sheet)({"a": images, "b": images}, ["a", "b", "c"])
    checked(sampling.in_batches)(lambda texts, *noise: images[: len(texts)], PROMPTS, (2, 4, 1), 2)
    for wrong in (images[..., :2], images.astype(np.float32)):
        with pytest.raises(jaxtyping.TypeCheckError):
            checked(colours.read_colours)(wrong)
    with pytest.raises(jaxtyping.TypeCheckError):  # needs equally many images
        checked(measures.score)(images, PROMPTS, classifier, features[:2])
