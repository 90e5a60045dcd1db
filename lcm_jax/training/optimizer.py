"""AdamW or Adafactor, the learning rate over the steps, and clipping."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float, UInt32

from lcm_jax.config import OptimizerConfig
from lcm_jax.training.hashing import mixed, places


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
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer behind clipping by the global norm; with bfloat16 moments, `update` needs a `key`.

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
    optimizer = _unclipped(config, rate)
    return optax.chain(_clip(config.clip_norm), optimizer) if config.clip_norm else optimizer


def _unclipped(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    if config.name == "adamw" and config.moments_dtype == "float32":
        return optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    scaled = [_adam_in_bfloat16(config.b1, config.b2, config.eps)]
    if config.name == "adafactor":
        # arXiv 1804.04235, algorithms 4 and 5 without the scale of the weights, so that the learning rate means what
        # it means for AdamW; the weight decay is AdamW's too (that of optax.adafactor ignores the learning rate)
        scaled = [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    return optax.chain(*scaled, optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate))


def _clip(most: float) -> optax.GradientTransformation:
    """Clipping by the global norm, as one factor for all gradients.

    That costs no pass over them, as optax's division does: whatever reads a gradient multiplies while it reads.
    """

    def clip(grads: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(clip)


_ROUNDING = 2**31 - 3  # folded into an update's key; no draw of a loss uses it


def _adam_in_bfloat16(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Adam's scaling with both moments stored in bfloat16 and computed in float32.

    The second moment changes by 1 - b2 of itself in a step, less than half a unit of bfloat16's 8 bits: rounded to the
    nearest, it would stand still. It is rounded up or down at random, in proportion to the distance, so that its mean
    is exact.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params, dtype=jnp.bfloat16)
        return optax.ScaleByAdamState(jnp.int32(0), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, optax.ScaleByAdamState]:
        mu, nu = (optax.tree.cast(tree, jnp.float32) for tree in (state.mu, state.nu))
        mu = optax.tree.update_moment(updates, mu, b1, 1)
        nu = optax.tree.update_moment(updates, nu, b2, 2)
        count = state.count + 1
        mean, square = optax.tree.bias_correction(mu, b1, count), optax.tree.bias_correction(nu, b2, count)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        leaves, structure = jax.tree.flatten(nu)
        seeds = jax.random.bits(jax.random.fold_in(extra["key"], _ROUNDING), (len(leaves),), jnp.uint32)
        rounded = structure.unflatten([stochastically_rounded(v, seeds[i]) for i, v in enumerate(leaves)])
        return scaled, optax.ScaleByAdamState(count, optax.tree.cast(mu, jnp.bfloat16), rounded)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastically_rounded(x: Float[Array, "..."], seed: UInt32[Array, ""]) -> BFloat16[Array, "..."]:
    """Rounds finite float32 to one of the two neighbouring bfloat16 values, so that the expectation over seeds is x.

    The noise is a hash of the seed and the element's index, with fewer operations than jax.random's. It does not depend
    on how x is divided over devices.
    """
    noise = mixed(places(x.shape) * jnp.uint32(0x9E3779B1) + seed) >> 16  # carries into the kept bits, or does not
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    return jax.lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)
