"""How far two values of a consistency function are apart, as one number."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float


def huber(difference: Float[Array, "b *d"], c: float) -> Float[Array, ""]:
    """Pseudo-Huber: the mean of sqrt(d^2 + c^2) - c."""
    return jnp.mean(jnp.sqrt(difference**2 + c**2) - c)


def l2(difference: Float[Array, "b *d"], c: float) -> Float[Array, ""]:
    """The mean of d^2; c is not used."""
    return jnp.mean(difference**2)


DISTANCES: dict[str, Callable[[Float[Array, "b *d"], float], Float[Array, ""]]] = {"huber": huber, "l2": l2}
