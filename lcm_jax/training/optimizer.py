"""AdamW, its learning rate over the steps, and clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lcm_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: linear warm-up, then constant or cosine to zero."""
    if config.decay == "cosine":
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - config.warmup_steps, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps == 0:
        return after
    # the first step already moves: the ramp goes from 1/warmup to 1
    warmup = optax.linear_schedule(
        config.learning_rate / config.warmup_steps, config.learning_rate, config.warmup_steps - 1
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, steps: int, own_rate: float | None = None, every: int = 1
) -> optax.GradientTransformation:
    """Returns AdamW behind clipping by the global norm.

    Args:
      config: of the run.
      steps: of the run, over which the learning rate decays.
      own_rate: replaces the config's learning rate.
      every: steps of the run between two updates; warm-up and decay are those of the run's steps.
    """
    if own_rate is not None:
        config = dataclasses.replace(config, learning_rate=own_rate)
    of_step = learning_rate(config, steps)
    rate = of_step if every == 1 else lambda count: of_step(count * every)
    adamw = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    return optax.chain(_clip(config.clip_norm), adamw) if config.clip_norm else adamw


def _clip(most: float) -> optax.GradientTransformation:
    """Clipping by the global norm, as one factor for all gradients.

    That costs no pass over them, as optax's division does: whatever reads a gradient multiplies while it reads.
    """

    def clip(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)
