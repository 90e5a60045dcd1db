"""FlashAttention-2 (arXiv 2307.08691) as a Pallas kernel for TPU.

At 4,096 tokens there are 16.8 million attention scores per head; writing and reading them takes longer than the rest
of the layer. The kernel keeps one block of scores in VMEM. Tokens lie along the 128 lanes and the head's 40 to 160
channels along the sublanes. So channels aren't padded to lanes, maximum and sum of a query are column reductions, and
the projections before and after the kernel need no transpose. On other platforms the kernel is interpreted: correct,
but slow.
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

BLOCK = 256  # the number of tokens must be a multiple of it
# Max BLOCKs per grid step: queries, keys (forward), keys (backward); half for float32.
# Keys are processed BLOCK by BLOCK, so that the compiler overlaps the softmax of one with the products of the next.
QUERIES, KEYS, KEYS_BACKWARD = 2, 8, 4
LANES = 128
HEAD = 8 * 2**20  # bytes, half of a kernel's VMEM: max for a head's query gradient, which stays there

_OVER_CHANNELS, _OVER_TOKENS, _PLAIN = ((0,), (0,)), ((1,), (1,)), ((1,), (0,))  # contracted axes: a^T b, a b^T, a b


def flash_attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"], *, block: int = BLOCK
) -> Float[Array, "b n h d"]:
    """Computes softmax(q k^T / sqrt(d)) v, one head at a time, with float32 scores, softmax and sums.

    The output and the log normalizers are named "attention" for `jax.checkpoint` policies.

    Raises:
      ValueError: n or m is not a multiple of `block`.
    """
    for tokens in (q.shape[1], k.shape[1]):
        if tokens % block:
            raise ValueError(f"{tokens} tokens are not a multiple of the block size {block}")
    b, _, h, d = q.shape
    y: Array = _attention(*(x.transpose(0, 2, 3, 1).reshape(b * h, d, -1) for x in (q, k, v)), block)
    return y.reshape(b, h, d, -1).transpose(0, 3, 1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: Array, k: Array, v: Array, block: int) -> Array:
    return _forward(q, k, v, block)[0]


def _forward(q: Array, k: Array, v: Array, block: int) -> tuple[Array, tuple[Array, ...]]:
    (heads, d, n), m = q.shape, k.shape[2]
    rows, columns = _largest(n, block, QUERIES, q), _largest(m, block, KEYS, q)
    queries = pl.BlockSpec((None, d, rows), lambda head, i, j: (head, 0, i))
    keys = pl.BlockSpec((None, d, columns), lambda head, i, j: (head, 0, j))
    number = pl.BlockSpec((None, 1, rows), lambda head, i, j: (head, 0, i))  # one per query
    y, normalizer = _call(
        functools.partial(_forward_kernel, scale=d**-0.5, block=block),
        (q, k, v),
        grid=(heads, n // rows, m // columns),
        parallel=2,
        in_specs=[queries, keys, keys],
        out_specs=[queries, number],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((heads, 1, n), jnp.float32)],
        scratch=[(1, rows), (1, rows), (d, rows)],
        # the second product has fewer rows, but waits for the softmax
        cost=_cost(q, m, 2 * _lanes(d), 2 * _bytes(q) + n // rows * 2 * _bytes(k)),
    )
    y, normalizer = checkpoint_name(y, "attention"), checkpoint_name(normalizer, "attention")
    return y, (q, k, v, y, normalizer)


def _forward_kernel(q_ref, k_ref, v_ref, y_ref, normalizer_ref, most_ref, total_ref, sum_ref, *, scale, block) -> None:
    """Processes a block of queries and a block of keys: updates running maximum, normalizer and weighted sum."""
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _() -> None:
        most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    q, most, total, sum_ = q_ref[...], most_ref[...], total_ref[...], sum_ref[...]
    for keys in _parts(k_ref, block):
        scores = _dot(k_ref[:, keys], q, _OVER_CHANNELS) * scale  # keys x queries
        now = jnp.maximum(most, scores.max(axis=0, keepdims=True))
        p, shrink = jnp.exp(scores - now), jnp.exp(most - now)
        total = total * shrink + p.sum(axis=0, keepdims=True)
        sum_ = sum_ * shrink + _dot(v_ref[:, keys], p.astype(v_ref.dtype), _PLAIN)
        most = now
    most_ref[...], total_ref[...], sum_ref[...] = most, total, sum_

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        y_ref[...] = (sum_ref[...] / total_ref[...]).astype(y_ref.dtype)
        normalizer_ref[...] = most_ref[...] + jnp.log(total_ref[...])


def _backward(block: int, kept: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array]:
    q, k, v, y, normalizer = kept
    d, n = q.shape[1:]
    # sum over keys of p dp = y · dy
    delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=1, keepdims=True)
    # max queries whose gradient fits: the float32 sum and a double-buffered output
    most = HEAD // (d * (4 + 2 * q.dtype.itemsize))
    size = _largest(n, block, max(most // block, 1))
    parts = [slice(start, start + size) for start in range(0, n, size)]
    found = [_gradients(q[..., p], k, v, dy[..., p], normalizer[..., p], delta[..., p], block) for p in parts]
    if len(found) == 1:
        return found[0]
    dq, dk, dv = zip(*found, strict=True)
    return jnp.concatenate(dq, axis=2), _sum(dk), _sum(dv)


def _sum(parts: tuple[Array, ...]) -> Array:
    return jnp.sum(jnp.stack(parts).astype(jnp.float32), axis=0).astype(parts[0].dtype)


def _gradients(
    q: Array, k: Array, v: Array, dy: Array, normalizer: Array, delta: Array, block: int
) -> tuple[Array, Array, Array]:
    (heads, d, n), m = q.shape, k.shape[2]
    rows, columns = _largest(n, block, QUERIES, q), _largest(m, block, KEYS_BACKWARD, q)
    queries = pl.BlockSpec((None, d, rows), lambda head, j, i: (head, 0, i))
    keys = pl.BlockSpec((None, d, columns), lambda head, j, i: (head, 0, j))
    number = pl.BlockSpec((None, 1, rows), lambda head, j, i: (head, 0, i))
    of_head = pl.BlockSpec((None, d, n), lambda head, j, i: (head, 0, 0))  # dq stays in VMEM until the last keys
    return _call(
        functools.partial(_backward_kernel, scale=d**-0.5, block=block),
        (q, k, v, dy, normalizer, delta),
        grid=(heads, m // columns, n // rows),
        parallel=1,
        in_specs=[queries, keys, keys, queries, number, number],
        out_specs=[of_head, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch=[(d, n), (d, columns), (d, columns)],
        cost=_cost(q, m, 2 * _lanes(d) + 3 * d, (m // columns * 2 + 1) * _bytes(q) + 4 * _bytes(k)),
    )


def _backward_kernel(
    q_ref, k_ref, v_ref, dy_ref, normalizer, delta, dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum, *, scale, block
) -> None:
    """Processes a block of keys and one of queries; dk and dv end with the last queries, dq with the last keys."""
    j, i = pl.program_id(1), pl.program_id(2)
    rows = pl.ds(pl.multiple_of(i * q_ref.shape[1], q_ref.shape[1]), q_ref.shape[1])

    @pl.when(i == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    @pl.when(j == 0)
    def _() -> None:
        dq_sum[:, rows] = jnp.zeros(q_ref.shape, jnp.float32)

    q, dy, dq = q_ref[...], dy_ref[...], dq_sum[:, rows]
    for keys in _parts(k_ref, block):
        k, v = k_ref[:, keys], v_ref[:, keys]
        p = jnp.exp(_dot(k, q, _OVER_CHANNELS) * scale - normalizer[...])  # keys x queries
        ds = p * (_dot(v, dy, _OVER_CHANNELS) - delta[...]) * scale
        p, ds = p.astype(q.dtype), ds.astype(q.dtype)
        dv_sum[:, keys] += _dot(dy, p, _OVER_TOKENS)
        dk_sum[:, keys] += _dot(q, ds, _OVER_TOKENS)
        dq += _dot(k, ds, _PLAIN)
    dq_sum[:, rows] = dq

    @pl.when(i == pl.num_programs(2) - 1)
    def _() -> None:
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(j == pl.num_programs(1) - 1)
    def _() -> None:
        dq_ref[:, rows] = dq_sum[:, rows].astype(dq_ref.dtype)


_attention.defvjp(_forward, _backward)


def _largest(tokens: int, block: int, most: int, x: Array | None = None) -> int:
    """Returns the largest multiple of `block` that divides `tokens`, at most `most` blocks (half for a float32 x)."""
    if x is not None and x.dtype == jnp.float32:
        most = max(most // 2, 1)
    return max(n * block for n in range(1, most + 1) if tokens % (n * block) == 0)


def _parts(ref: Any, block: int) -> list[slice]:
    return [slice(start, start + block) for start in range(0, ref.shape[1], block)]


def _dot(a: Any, b: Any, contracted: tuple[tuple[int], tuple[int]]) -> Any:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contracted, ((), ())), precision, preferred_element_type=jnp.float32)


def _lanes(d: int) -> int:
    """Returns d rounded up to the 128 channels that the matrix unit contracts at a time."""
    return -(-d // LANES) * LANES


def _bytes(x: Array) -> int:
    return x.size * x.dtype.itemsize


def _cost(q: Array, keys: int, channels: int, moved: int) -> pl.CostEstimate:
    """Returns the kernel's cost estimate for XLA, which counts a kernel without one as free.

    Args:
      q: queries.
      keys: number of keys per query.
      channels: sum over all products of the channels per query and key, padded for the matrix unit.
      moved: upper bound on the bytes of queries, keys and values read and written.
    """
    scores = q.shape[0] * q.shape[2] * keys
    passes = 6 if q.dtype == jnp.float32 else 1  # bfloat16 passes at the highest precision
    return pl.CostEstimate(flops=2 * scores * channels * passes, transcendentals=scores, bytes_accessed=moved)


def _call(
    kernel: Callable[..., None],
    operands: tuple[Array, ...],
    *,
    grid: tuple[int, int, int],
    parallel: int,
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    out_shape: list[jax.ShapeDtypeStruct],
    scratch: list[tuple[int, int]],
    cost: pl.CostEstimate,
) -> Any:
    """Runs a kernel over a grid whose first `parallel` axes are independent."""
    call = functools.partial(
        pl.pallas_call,
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (3 - parallel),
        ),
    )
    return jax.lax.platform_dependent(*operands, tpu=call(), default=call(interpret=True))
