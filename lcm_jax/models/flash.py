"""Attention without its table of scores, as a Pallas kernel for TPUs (FlashAttention-2, arXiv 2307.08691, on a grid).

At 4,096 tokens a table of scores has 16.8 million entries a head: writing and reading it takes longer than all else in
the layer. Here a block of it lives in fast memory only. Heads of 40, 64, 80 or 160 are padded with zeros to the 128
lanes of a TPU, which changes no score. On other platforms the kernel is interpreted: right, and slow.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
BLOCK = 512  # tokens of a block of queries, or of keys; a number of tokens that it does not divide takes no kernel

_OVER_ROWS, _OVER_LANES, _PLAIN = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))  # contracted axes: a^T b, a b^T, a b


def flash_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], *, block: int = BLOCK
) -> Float[Array, "b n h d"]:
    """Returns softmax(q k^T / sqrt(d)) v, a head at a time; scores, softmax and sums are float32.

    Its output and the logarithms of its normalizers are named "attention" for policies of `jax.checkpoint`.

    Raises: ValueError for a number of tokens that is no multiple of `block`.
    """
    for tokens in (q.shape[1], k.shape[1]):
        if tokens % block:
            raise ValueError(f"{tokens} tokens are no multiple of the block of {block}")
    b, _, h, d = q.shape
    padded = (_heads_first(x, -d % LANES) for x in (q, k, v))
    y: Array = _attention(*padded, d**-0.5, block)
    return y[..., :d].reshape(b, h, -1, d).transpose(0, 2, 1, 3)


def _heads_first(x: Float[Array, "b n h d"], padding: int) -> Float[Array, "bh n e"]:
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding))).transpose(0, 2, 1, 3)
    return x.reshape(-1, *x.shape[2:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q: Array, k: Array, v: Array, scale: float, block: int) -> Array:
    return _forward(q, k, v, scale, block)[0]


def _forward(q: Array, k: Array, v: Array, scale: float, block: int) -> tuple[Array, tuple[Array, ...]]:
    (heads, n, d), m = q.shape, k.shape[1]
    rows = pl.BlockSpec((None, block, d), lambda head, i, j: (head, i, 0))
    columns = pl.BlockSpec((None, block, d), lambda head, i, j: (head, j, 0))
    row_numbers = pl.BlockSpec((None, block, LANES), lambda head, i, j: (head, i, 0))
    y, normalizer = _call(
        functools.partial(_forward_kernel, scale=scale),
        (q, k, v),
        grid=(heads, n // block, m // block),
        in_specs=[rows, columns, columns],
        out_specs=[rows, row_numbers],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, n, LANES), jnp.float32)],
        scratch=[(block, LANES), (block, LANES), (block, d)],
        products=2,
    )
    y = checkpoint_name(y, "attention")
    normalizer = checkpoint_name(normalizer[..., 0], "attention")  # the same number in each lane
    return y, (q, k, v, y, normalizer)


def _forward_kernel(q_ref, k_ref, v_ref, y_ref, normalizer_ref, most, total, sum_, *, scale) -> None:
    """One block of queries against one of keys, after those before it: `most`, `total` and `sum_` are running."""
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _() -> None:
        most[...] = jnp.full_like(most, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        sum_[...] = jnp.zeros_like(sum_)

    scores = _dot(q_ref[...], k_ref[...], _OVER_LANES) * scale
    before = most[:, :1]
    now = jnp.maximum(before, scores.max(axis=1, keepdims=True))
    p, shrink = jnp.exp(scores - now), jnp.exp(before - now)
    most[...] = jnp.broadcast_to(now, most.shape)
    total[...] = total[...] * shrink + p.sum(axis=1, keepdims=True)
    sum_[...] = sum_[...] * shrink + _dot(p.astype(v_ref.dtype), v_ref[...], _PLAIN)

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = (sum_[...] / total[:, :1]).astype(y_ref.dtype)
        normalizer_ref[...] = most[...] + jnp.log(total[...])


def _backward(scale: float, block: int, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, normalizer = kept
    (heads, n, d), m = q.shape, k.shape[1]
    # sum over keys of p dp is y . dy; both numbers of a row go to all lanes, as the kernels read them
    delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=-1)
    numbers = [jnp.broadcast_to(x[..., None], (heads, n, LANES)) for x in (normalizer, delta)]
    operands = (q, k, v, dy, *numbers)

    def specs(row: Callable[..., Any], column: Callable[..., Any]) -> list[pl.BlockSpec]:
        rows, columns = pl.BlockSpec((None, block, d), row), pl.BlockSpec((None, block, d), column)
        return [rows, columns, columns, rows, *[pl.BlockSpec((None, block, LANES), row)] * 2]

    outer, inner = (lambda head, i, j: (head, i, 0)), (lambda head, i, j: (head, j, 0))
    (dq,) = _call(
        functools.partial(_dq_kernel, scale=scale),
        operands,
        grid=(heads, n // block, m // block),
        in_specs=specs(row=outer, column=inner),
        out_specs=[pl.BlockSpec((None, block, d), outer)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        scratch=[(block, d)],
        products=3,
    )
    dk, dv = _call(
        functools.partial(_dkv_kernel, scale=scale),
        operands,
        grid=(heads, m // block, n // block),
        in_specs=specs(row=inner, column=outer),
        out_specs=[pl.BlockSpec((None, block, d), outer)] * 2,
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch=[(block, d), (block, d)],
        products=4,
    )
    return dq, dk, dv


_attention.defvjp(_forward, _backward)


def _weights(q_ref: Any, k_ref: Any, v_ref: Any, dy_ref: Any, normalizer: Any, delta: Any, scale: float) -> Any:
    """The block of p = softmax(scores) and the gradient of its scores."""
    p = jnp.exp(_dot(q_ref[...], k_ref[...], _OVER_LANES) * scale - normalizer[:, :1])
    dp = _dot(dy_ref[...], v_ref[...], _OVER_LANES)
    return p, p * (dp - delta[:, :1]) * scale


def _dq_kernel(q_ref, k_ref, v_ref, dy_ref, normalizer, delta, dq_ref, sum_, *, scale) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        sum_[...] = jnp.zeros_like(sum_)

    _, ds = _weights(q_ref, k_ref, v_ref, dy_ref, normalizer, delta, scale)
    sum_[...] += _dot(ds.astype(k_ref.dtype), k_ref[...], _PLAIN)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        dq_ref[...] = sum_[...].astype(dq_ref.dtype)


def _dkv_kernel(q_ref, k_ref, v_ref, dy_ref, normalizer, delta, dk_ref, dv_ref, dk_sum, dv_sum, *, scale) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    p, ds = _weights(q_ref, k_ref, v_ref, dy_ref, normalizer, delta, scale)
    dv_sum[...] += _dot(p.astype(dy_ref.dtype), dy_ref[...], _OVER_ROWS)
    dk_sum[...] += _dot(ds.astype(q_ref.dtype), q_ref[...], _OVER_ROWS)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _dot(a: Any, b: Any, contracted: tuple[tuple[int], tuple[int]]) -> Any:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision, preferred_element_type=jnp.float32)


def _call(
    kernel: Callable[..., None],
    operands: tuple[Array, ...],
    *,
    grid: tuple[int, int, int],
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    out_shape: list[jax.ShapeDtypeStruct],
    scratch: list[tuple[int, int]],
    products: int,
) -> Any:
    """Runs a kernel over (heads, outer blocks, inner blocks), the last one after the other.

    `products` matrix products of (block, d) by (block, d) are what it computes for each pair of blocks.
    """
    (heads, outer, inner), d = grid, operands[0].shape[-1]
    shape: Any = in_specs[0].block_shape  # all have the same length
    length = shape[1]
    scores = heads * outer * length * inner * length

    def size(x: Array | jax.ShapeDtypeStruct) -> int:
        return x.size * x.dtype.itemsize

    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        # XLA sees nothing of a kernel: without these numbers its estimates take it for nothing
        cost_estimate=pl.CostEstimate(
            flops=2 * products * scores * d,
            transcendentals=scores,
            bytes_accessed=outer * sum(map(size, operands)) + sum(map(size, out_shape)),  # at most
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )
    return jax.lax.platform_dependent(*operands, tpu=call(), default=call(interpret=True))
