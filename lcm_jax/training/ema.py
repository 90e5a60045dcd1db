"""Exponential moving average (EMA) of the weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


def decay_at(step: Int[Array, ""], decay: float, *, warmup: bool) -> jax.Array:
    """Returns the decay at a step: `decay`, with warm-up limited to (1 + step) / (10 + step)."""
    if not warmup:
        return jnp.float32(decay)
    return jnp.minimum(jnp.float32(decay), (1.0 + step) / (10.0 + step))


def update(ema: PyTree[jax.Array], params: PyTree[jax.Array], decay: jax.Array) -> PyTree[jax.Array]:
    """Returns `decay * ema + (1 - decay) * params`, leaf by leaf, in float32 (LCM, Algorithm 1: theta^-)."""
    return jax.tree.map(lambda e, p: e + (1.0 - decay) * (p - e), ema, params)
