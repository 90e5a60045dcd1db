"""Attention on a CPU where there are many tokens: some rows of one head's table at a time, which stay in its cache.

At 4,096 tokens the tables of eight heads are half a gigabyte; a CPU takes three times as long for the gradient if it
writes them to memory. Nothing of the table is kept: the gradient computes it again from the logarithms of the softmax's
normalizers, as FlashAttention does (arXiv 2205.14135).
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

TABLE = 2**20  # numbers in float32: four megabytes


def row_attention(
    q: Float[Array, "b h n d"], k: Float[Array, "b h m d"], v: Float[Array, "b h m d"]
) -> Float[Array, "b h n d"]:
    """Returns softmax(q k^T / sqrt(d)) v; scores, softmax and sums are float32."""
    y: Array = _attention(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
    return y.reshape(q.shape)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array) -> Array:
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    def of_head(head: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = head

        def of_rows(q: Array) -> tuple[Array, Array]:
            scores = _scores(q, k)
            most = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - most)
            total = weights.sum(-1, keepdims=True)
            y = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (y / total).astype(v.dtype), most + jnp.log(total)

        y, normalizer = jax.lax.map(of_rows, _in_rows(q, k))
        return y.reshape(q.shape), normalizer.reshape(-1, 1)

    y, normalizer = (checkpoint_name(x, "attention") for x in jax.lax.map(of_head, (q, k, v)))
    return y, (q, k, v, y, normalizer)


def _backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    def of_head(head: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, y, normalizer, dy = head

        def of_rows(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q, y, normalizer, dy = rows
            weights = jnp.exp(_scores(q, k) - normalizer)
            dweights = jnp.matmul(dy, v.T, preferred_element_type=jnp.float32)
            along = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
            dscores = (q.shape[-1] ** -0.5 * weights * (dweights - along)).astype(q.dtype)
            # transposed: the table is taken as it lies in memory
            dk = jnp.matmul(q.T, dscores, preferred_element_type=jnp.float32)
            dv = jnp.matmul(dy.T, weights.astype(dy.dtype), preferred_element_type=jnp.float32)
            return (sums[0] + dk, sums[1] + dv), jnp.matmul(dscores, k)

        zeros = jnp.zeros((k.shape[1], len(k)), jnp.float32)
        (dk, dv), dq = jax.lax.scan(of_rows, (zeros, zeros), tuple(_in_rows(x, k) for x in (q, y, normalizer, dy)))
        return dq.reshape(q.shape), dk.T.astype(k.dtype), dv.T.astype(v.dtype)

    return jax.lax.map(of_head, (*kept, dy))


def _scores(q: Array, k: Array) -> Array:
    return q.shape[-1] ** -0.5 * jnp.matmul(q, k.T, preferred_element_type=jnp.float32)


def _in_rows(x: Array, k: Array) -> Array:
    """(n, c) to (parts, rows, c), such that `rows` rows of scores against k are TABLE numbers at most, if n allows."""
    rows = len(x)
    while rows * len(k) > TABLE and rows % 2 == 0:
        rows //= 2
    return x.reshape(-1, rows, x.shape[-1])


_attention.defvjp(_forward, _backward)
