"""Softmax attention that dispatches to XLA, cuDNN or a Pallas TPU kernel."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lcm_jax.models.kernels import row_attention
from lcm_jax.models.kernels.flash import BLOCK, flash_attention

Implementation = Literal["xla", "cudnn", "pallas"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "cudnn", "pallas")

LONG = 1024  # min tokens: below it, XLA's attention is faster on TPU than the kernel
CUDNN_HEAD = 128  # max channels per head that cuDNN supports on every GPU


def attend(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], implementation: Implementation
) -> Float[Array, "b n h d"]:
    """Computes softmax(q k^T / sqrt(d)) v, with float32 scores and softmax.

    "xla" (`plain_attention`) writes the attention scores to memory, except large ones on CPU. "cudnn" (GPU, 16-bit
    dtypes) and "pallas" (TPU) do not. "cudnn" requires a head dimension of at most 128 and a multiple of 8. "pallas"
    requires at least 1,024 queries and keys, each a multiple of its block. Unsupported shapes fall back to "xla". The
    output is named "attention" for `jax.checkpoint` policies.
    """
    n, m, d = q.shape[1], k.shape[1], q.shape[3]
    if implementation == "pallas" and min(n, m) >= LONG and n % BLOCK == m % BLOCK == 0:
        return flash_attention(q, k, v)
    if implementation == "cudnn" and d <= CUDNN_HEAD and d % 8 == 0:
        return cudnn_attention(q, k, v)
    return plain_attention(q, k, v)


def cudnn_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Computes softmax(q k^T / sqrt(d)) v with cuDNN's flash attention.

    JAX doesn't support its gradient for odd sequence lengths, such as a prompt's 77 tokens. These are padded by one
    masked token.
    """
    (b, n), m = q.shape[:2], k.shape[1]
    lengths: dict[str, Any] = {}
    if n % 2 or m % 2:
        q, k, v = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (q, k, v))
        lengths = {"query_seq_lengths": jnp.full(b, n), "key_value_seq_lengths": jnp.full(b, m)}
    y = jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)
    return checkpoint_name(y[:, :n], "attention")


def plain_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Computes softmax(q k^T / sqrt(d)) v as one matrix product per head.

    The attention scores are the largest array here. All products, forward and backward, read them in their memory
    layout; by default, XLA on CPU would transpose them. The softmax normalizer divides the output instead of the
    scores. Scores larger than the cache are recomputed in the backward pass (`row_attention`).
    """
    heads = tuple(x.transpose(0, 2, 1, 3) for x in (q, k, v))
    if q.shape[1] * k.shape[1] < row_attention.TABLE:
        y: Array = _attention(*heads)
    else:
        y = row_attention.row_attention(*heads)
    return y.transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attention(q: Array, k: Array, v: Array) -> Array:
    return _attention_forward(q, k, v)[0]


def _attention_forward(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    weights = jnp.exp(q.shape[-1] ** -0.5 * (scores - scores.max(-1, keepdims=True))).astype(v.dtype)
    share = 1 / weights.astype(jnp.float32).sum(-1, keepdims=True)
    y = jnp.einsum("bhnm,bhmd->bhnd", weights, v, preferred_element_type=jnp.float32)
    y = checkpoint_name((y * share).astype(v.dtype), "attention")
    return y, (q, k, v, weights, share, y)


def _attention_backward(kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v, weights, share, y = kept
    dy = dy * share  # float32; absorbs the normalizer of `weights`
    along = (dy * y).sum(-1, keepdims=True)  # gradient through the row's normalizer
    dy = dy.astype(v.dtype)
    dweights = jnp.einsum("bhnd,bhmd->bhnm", dy, v, preferred_element_type=jnp.float32)
    dscores = (q.shape[-1] ** -0.5 * weights * (dweights - along)).astype(q.dtype)
    dq = jnp.einsum("bhnm,bhmd->bhnd", dscores, k)
    dk = jnp.einsum("bhdn,bhnm->bhdm", q.swapaxes(2, 3), dscores).swapaxes(2, 3)
    dv = jnp.einsum("bhdn,bhnm->bhdm", dy.swapaxes(2, 3), weights).swapaxes(2, 3)
    return dq, dk, dv


_attention.defvjp(_attention_forward, _attention_backward)
