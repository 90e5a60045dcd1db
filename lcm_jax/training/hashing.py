"""Hashes of 32-bit words, a few integer operations each: for checksums, and for noise where threefry would be dear."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def places(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns the index of each element of an array of this shape, modulo 2^32."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def mixed(words: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns a bijection of the words in which each bit depends on all: the finalizer of MurmurHash3."""
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return words ^ (words >> 16)
