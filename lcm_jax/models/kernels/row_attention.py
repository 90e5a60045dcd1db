"""Attention for long sequences that recomputes the attention scores in the backward pass.

The backward pass restores the softmax from the log normalizers, as FlashAttention does (arXiv 2205.14135). On CPU, a
few rows of one head's scores are processed at a time and stay in the cache. At 4,096 tokens, the scores of eight heads
are half a gigabyte; a gradient that stores them takes three times as long.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

TABLE = 2**20  # max float32 scores at a time: 4 MB


def row_attention(
    q: Float[Array, "b h n d"], k: Float[Array, "b h m d"], v: Float[Array, "b h m d"]
) -> Float[Array, "b h n d"]:
    """Computes softmax(q k^T / sqrt(d)) v, with float32 scores, softmax and sums.

    The output and the log normalizers are named "attention" for `jax.checkpoint` policies.
    """
    y: Array = _attention(*(x.reshape(-1, *x.shape[2:]) for x in (q, k, v)))
    return y.reshape(q.shape)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array) -> Array:
    return _forward(q, k, v)[0]


def _forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    found = jax.lax.platform_dependent(q, k, v, cpu=_values_by_rows, default=_values)
    y, normalizer = (checkpoint_name(x, "attention") for x in found)
    return y, (q, k, v, y, normalizer)


def _backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    _, k, v, *_ = kept
    dq, dk, dv = jax.lax.platform_dependent(*kept, dy, cpu=_gradients_by_rows, default=_gradients)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


_attention.defvjp(_forward, _backward)


def _scores(q: Array, k: Array) -> Array:
    return q.shape[-1] ** -0.5 * jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)


@jax.jit
def recomputed_scores(q: Array, k: Array) -> Array:
    """Recomputes the scores; `planning.flops` excludes these FLOPs by the prefix `recomputed_`."""
    return _scores(q, k)


def _values(q: Float[Array, "*b n d"], k: Float[Array, "*b m d"], v: Float[Array, "*b m d"]) -> tuple[Array, Array]:
    """Returns the output (n, d) and the float32 log normalizers (n, 1)."""
    scores = _scores(q, k)
    most = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - most).astype(v.dtype)  # cast before the sum, or TPU writes a float32 copy
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    y = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    return (y / total).astype(v.dtype), most + jnp.log(total)


def _gradients(q: Array, k: Array, v: Array, y: Array, normalizer: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Returns dq, and dk and dv in float32; all products read the scores in their memory layout."""
    weights = jnp.exp(recomputed_scores(q, k) - normalizer)
    dweights = jnp.matmul(dy, v.mT, preferred_element_type=jnp.float32)
    along = (dy.astype(jnp.float32) * y).sum(-1, keepdims=True)
    dscores = (q.shape[-1] ** -0.5 * weights * (dweights - along)).astype(q.dtype)
    dk = jnp.matmul(q.mT, dscores, preferred_element_type=jnp.float32).mT
    dv = jnp.matmul(dy.mT, weights.astype(dy.dtype), preferred_element_type=jnp.float32).mT
    return jnp.matmul(dscores, k), dk, dv


def _values_by_rows(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    def of_head(head: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v = head
        y, normalizer = jax.lax.map(lambda rows: _values(rows, k, v), _in_rows(q, k))
        return y.reshape(q.shape), normalizer.reshape(-1, 1)

    return jax.lax.map(of_head, (q, k, v))


def _gradients_by_rows(*args: Array) -> tuple[Array, Array, Array]:
    def of_head(head: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, y, normalizer, dy = head

        def add(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            q, y, normalizer, dy = rows
            dq, dk, dv = _gradients(q, k, v, y, normalizer, dy)
            return (sums[0] + dk, sums[1] + dv), dq

        zeros = jnp.zeros(k.shape, jnp.float32)
        (dk, dv), dq = jax.lax.scan(add, (zeros, zeros), tuple(_in_rows(x, k) for x in (q, y, normalizer, dy)))
        return dq.reshape(q.shape), dk, dv

    return jax.lax.map(of_head, args)


def _in_rows(x: Array, k: Array) -> Array:
    """Reshapes (n, c) to (parts, rows, c): halves rows until rows * len(k) <= TABLE or rows is odd."""
    rows = len(x)
    while rows * len(k) > TABLE and rows % 2 == 0:
        rows //= 2
    return x.reshape(-1, rows, x.shape[-1])
