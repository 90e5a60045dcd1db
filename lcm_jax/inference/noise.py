"""Random noise of single images: image i has the same noise in every batch."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MOST = 2**32  # random values per key: `jax.random.fold_in` takes 32 bits


def seed_key(seed: int) -> jax.Array:
    """Returns the random key of a seed in 0 … 2^64 - 1, a different one for each seed.

    `jax.random.key` drops a seed's upper 32 bits unless x64 is enabled; seeds below 2^32 give the same key either way.
    """
    with jax.enable_x64(True):
        return jax.random.key(np.uint64(seed), impl="threefry2x32")


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw(
    key: jax.Array, first: int, shape: tuple[int, ...], between: int
) -> tuple[Float[Array, "b h w c"], Float[Array, "n b h w c"]]:
    """Draws the noise of images `first` to `first` + b - 1.

    Args:
      key: of the seed.
      first: number of the first image; (first + b) h w c must be at most MOST.
      shape: (b, h, w, c) of the latents.
      between: how often noise is added between the steps.

    Returns:
      The initial noise, and the noise (between, b, h, w, c) to add between the steps, both standard normal in float32.
    """
    latent_key, noise_key = jax.random.split(key)
    keys = jax.vmap(functools.partial(jax.random.fold_in, latent_key))(first + jnp.arange(shape[0]))
    z_T = jax.vmap(functools.partial(jax.random.normal, shape=shape[1:]))(keys)
    step_keys = jax.random.split(noise_key, between + 1)[:between]
    if not between:
        return z_T, jnp.zeros((0, *shape))
    return z_T, jax.vmap(lambda of_step: normal_rows(of_step, first, shape))(step_keys)


def normal_rows(key: jax.Array, first: int | jax.Array, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Returns the rows from `first` on of `jax.random.normal(key, (first + b, …))`, without drawing those before.

    JAX draws value k of an array from the key and k alone (`jax_threefry_partitionable`): its bits are those of
    `fold_in(key, k)`, both words combined. What follows turns bits into normal values as `jax.random.normal` does.

    Args:
      key: a threefry key.
      first: number of the first row.
      shape: (b, …) of the result.
    """
    size = math.prod(shape[1:])
    numbers = first * size + jnp.arange(shape[0] * size, dtype=jnp.uint32)
    words = jax.random.key_data(jax.vmap(functools.partial(jax.random.fold_in, key))(numbers))
    bits = words[:, 0] ^ words[:, 1]
    one_to_two = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32)
    low = np.nextafter(np.float32(-1), np.float32(0))
    uniform = jnp.maximum(low, (one_to_two - 1) * (np.float32(1) - low) + low)
    return (np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform)).reshape(shape)
