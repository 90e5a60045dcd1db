"""Tests that each prompt is sampled from its own noise, whatever the batch size."""

import numpy as np
import pytest

from lcm_jax.digits import evaluation_set, sampling
from lcm_jax.digits.evaluation_set import SEED, first_noise, later_noise

PROMPTS = evaluation_set.test_prompts()[:5]
SHAPE = (2, 3, 4)


def record(calls):
    """Returns a batch function whose output encodes all of its inputs; it appends batch sizes to `calls`."""

    def batch(texts, first, between):
        calls.append(len(texts))
        numbers = np.array([float(len(text)) for text in texts])
        noise = first.sum((1, 2, 3)) + (0 if between is None else between.sum((2, 3, 4)).T @ [10.0, 100.0])
        return np.stack([numbers, noise], 1)

    return batch


@pytest.mark.parametrize("lcm_steps", [0, 3])
@pytest.mark.parametrize("fill", [False, True])
def test_batches(monkeypatch, lcm_steps, fill):
    expected = [[len(p.text), z.sum()] for p, z in zip(PROMPTS, first_noise(5, SHAPE, SEED), strict=True)]
    if lcm_steps:
        between = later_noise(3, 5, SHAPE, SEED + 1).sum((2, 3, 4))
        expected = np.add(expected, np.stack([np.zeros(5), between.T @ [10.0, 100.0]], 1))
    for size, calls in ((2, [2, 2, 2 if fill else 1]), (5, [5]), (7, [7 if fill else 5])):
        monkeypatch.setattr(sampling, "BATCH", size)
        seen = []
        counts = []
        found, _ = sampling.in_batches(record(seen), PROMPTS, SHAPE, lcm_steps, fill=fill, done=counts.append)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert seen == calls
        assert counts == [min(size * (i + 1), 5) for i in range(len(calls))]


@pytest.mark.parametrize(("size", "rate"), [(2, (2 + 1) / (3 + 3)), (5, 5 / 100)])
def test_the_first_batch_is_not_timed_unless_it_is_the_only_one(monkeypatch, size, rate):
    clock = [0.0]

    def batch(texts, first, between):
        clock[0] += 3.0 if clock[0] else 100.0
        return first

    monkeypatch.setattr(sampling, "BATCH", size)
    monkeypatch.setattr(sampling.time, "perf_counter", lambda: clock[0])
    assert sampling.in_batches(batch, PROMPTS, SHAPE, 0)[1] == rate


class Model:
    """A fake pipeline that returns its noise and stores its other arguments."""

    def __init__(self, is_lcm):
        self.is_lcm = is_lcm

    def latent_shape(self, count):
        return count, *SHAPE

    def __call__(self, prompts, steps, guidance_scale, *, latents, noise, sampler, batch_size):
        assert batch_size == len(prompts)  # nothing is padded here
        self.told = prompts, steps, guidance_scale, sampler
        return latents if noise is None else latents + noise.sum(0)


def test_a_model_is_told_all(monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 2)
    teacher, student = Model(is_lcm=False), Model(is_lcm=True)
    images, _ = sampling.sample_all(teacher, PROMPTS, 8, 2.5, "dpmpp")
    assert teacher.told == ([PROMPTS[4].text], 8, 2.5, "dpmpp")
    np.testing.assert_array_equal(images, first_noise(5, SHAPE, SEED))
    images, _ = sampling.sample_all(student, PROMPTS, 3, 4.0, fill=True)
    assert student.told == ([PROMPTS[4].text, PROMPTS[0].text], 3, 4.0, None)
    np.testing.assert_allclose(
        images, first_noise(5, SHAPE, SEED) + later_noise(3, 5, SHAPE, SEED + 1).sum(0), rtol=1e-5
    )
    images, _ = sampling.sample_all(student, PROMPTS, 1, 4.0)
    np.testing.assert_array_equal(images, first_noise(5, SHAPE, SEED))
