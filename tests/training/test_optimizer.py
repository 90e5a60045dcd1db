"""The learning rate over the steps of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcm_jax.config import OptimizerConfig
from lcm_jax.training.optimizer import learning_rate, make_optimizer

STEPS = 12


def rates(config, updates, **options):
    """The learning rates of successive updates: with a constant gradient, AdamW moves a weight by the rate."""
    optimizer, weight = make_optimizer(config, STEPS, **options), jnp.float32(0)
    state = optimizer.init(weight)
    found = []
    for _ in range(updates):
        change, state = jax.jit(optimizer.update)(jnp.float32(1), state, weight)
        found.append(-change)
    return np.array(found)


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 4])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_rarer_updates_have_the_rate_of_their_step(decay, warmup_steps, every):
    config = OptimizerConfig(learning_rate=0.1, decay=decay, warmup_steps=warmup_steps, clip_norm=0.0)
    steps = range(0, STEPS, every)
    expected = [learning_rate(config, STEPS)(step) for step in steps]
    np.testing.assert_allclose(rates(config, len(steps), every=every), expected, rtol=1e-4, atol=1e-6)


def test_warm_up_reaches_an_own_rate_after_its_steps():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=4)
    found = rates(config, STEPS // 2, own_rate=0.2, every=2)
    np.testing.assert_allclose(found, [0.05, 0.15, 0.2, 0.2, 0.2, 0.2], rtol=1e-4)
