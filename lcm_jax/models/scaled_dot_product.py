"""Softmax attention by one of several programs, where each of them is the better one."""

from typing import Literal

import jax
from jaxtyping import Array, Float

from lcm_jax.models.flash import BLOCK, flash_attention

Implementation = Literal["xla", "cudnn", "pallas"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "cudnn", "pallas")

LONG = 4096  # tokens from which on the table of scores costs more than all else
CUDNN_HEAD = 128  # the widest head that cuDNN takes on every GPU


def attend(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], implementation: Implementation
) -> Float[Array, "b n h d"]:
    """Returns softmax(q k^T / sqrt(d)) v; scores and softmax are float32 inside.

    "xla" writes the table of scores to memory. "cudnn" (GPU, 16-bit numbers) and "pallas" (TPU) do not, and take the
    layers that they can or should: cuDNN heads of up to 128, a multiple of 8; the kernel for TPUs 4,096 tokens and more
    that see each other, a multiple of its block. All other layers are XLA's.
    """
    n, m, d = q.shape[1], k.shape[1], q.shape[3]
    if implementation == "pallas" and min(n, m) >= LONG and n % BLOCK == m % BLOCK == 0:
        return flash_attention(q, k, v)
    if implementation == "cudnn" and d <= CUDNN_HEAD and d % 8 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")
