"""The autoencoder's decoder in horizontal strips, for large images: the same function with less memory.

Tiles that are decoded one by one differ from the whole image, since group norm and attention look at all of it, and
need blending at their seams. Here every layer runs over all strips before the next one: a strip reads a row beyond its
edges, and norms use the statistics of the whole map. So results differ by rounding only, and there are no seams.

Each layer's output is kept whole. What is saved is what lies between: normalized maps, the attention's scores and, at
the full resolution, the last upsampler's output, which is computed twice instead of being kept.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcm_jax.models.layers import ResnetBlock2D, enlarge
from lcm_jax.models.norms import GroupNorm

PIXELS = 2**15  # of a strip, at most
Map = Float[Array, "b h w c"]
Padded = Float[Array, "b h+2 w c"]  # a map with an unused row above and below


class Moments(NamedTuple):
    """Statistics of the rows seen so far, per channel: their number of pixels, mean, and sum of squares around it."""

    count: Float[Array, ""]
    mean: Float[Array, "b 1 1 c"]
    squares: Float[Array, "b 1 1 c"]


class _Strips(NamedTuple):
    """How a map of `height` rows is divided: `count` strips of `rows`; the last one overlaps the one before."""

    height: int
    rows: int
    count: int

    def run(self, step: Callable[..., Any], carry: Any) -> Any:
        """Returns the carry after step(carry, first row, fresh) of all strips; `fresh` (rows,): not seen before."""

        def body(i: Any, carry: Any) -> Any:
            first = jnp.minimum(i * self.rows, self.height - self.rows)
            return step(carry, first, first + jnp.arange(self.rows) >= i * self.rows)

        return jax.lax.fori_loop(0, self.count, body, carry)


def decode(decoder: Any, z: Map, pixels: int = PIXELS) -> Map:
    """Returns what `decoder` (of `vae.AutoencoderKL`) returns for z.

    Args:
      decoder: with its weights.
      z: (b, h, w, c), unscaled latents after the first 1 x 1 convolution.
      pixels: of a strip, at most; at least a row.
    """
    x = _mid(decoder.mid_block, decoder.conv_in(z))
    kept, moments = _pad(x), _moments_of(x)
    *levels, last = decoder.up_blocks
    for level in levels:
        for resnet in level.resnets:
            kept, moments = _resnet(resnet, kept, moments, pixels)
        upsampler = level.upsamplers[0].conv
        if level is not levels[-1] or not hasattr(last.resnets[0], "conv_shortcut"):
            kept, moments = _upsample(upsampler, kept, pixels)
    resnets = list(last.resnets)
    if levels and hasattr(resnets[0], "conv_shortcut"):
        kept, moments = _resnet_after_upsampling(resnets.pop(0), levels[-1].upsamplers[0].conv, kept, pixels)
    for resnet in resnets:
        kept, moments = _resnet(resnet, kept, moments, pixels)
    return _last(decoder, kept, moments, pixels)


# ---- layers


def _mid(block: Any, x: Map) -> Map:
    """Returns the middle block's output; queries attend one row of pixels after the other."""
    x = block.resnets[0](x)
    if hasattr(block, "attentions"):
        attention = block.attentions[0]
        y = attention.group_norm(x)
        q, k, v = (f(y) for f in (attention.to_q, attention.to_k, attention.to_v))
        k, v = (a.reshape(len(a), -1, 1, a.shape[-1]) for a in (k, v))

        def attend(row: Array) -> Array:
            return jax.nn.dot_product_attention(row[:, :, None], k, v)[:, :, 0]

        rows = jax.lax.map(attend, q.swapaxes(0, 1)).swapaxes(0, 1)
        x = x + attention.to_out[0](rows)
    return block.resnets[1](x)


def _resnet(resnet: ResnetBlock2D, kept: Padded, moments: Moments, pixels: int) -> tuple[Padded, Moments]:
    strips = _divide(kept, pixels)
    normal = _normal(resnet.norm1, moments)

    def first(carry: Any, row: Any, fresh: Any) -> Any:
        inner, skip, seen = carry
        rows = _rows(kept, row, strips.rows + 2)
        if hasattr(resnet, "conv_shortcut"):
            skip = _put(skip, row, resnet.conv_shortcut(rows[:, 1:-1]))
        y = _convolved(resnet.conv1, _inside(normal(rows), row, strips.height))
        return _put(inner, row, y), skip, _update(seen, y, fresh)

    shape = (*kept.shape[:3], resnet.conv1.out_features)
    skip = _new(shape, kept[:, 1:]) if hasattr(resnet, "conv_shortcut") else kept
    inner, skip, seen = strips.run(first, (_new(shape, kept), skip, _no_moments(shape)))
    return _second_half(resnet, inner, seen, skip, strips)


def _resnet_after_upsampling(
    resnet: ResnetBlock2D, upsampler: Any, kept: Padded, pixels: int
) -> tuple[Padded, Moments]:
    """The first residual block at the full resolution: its input is never kept whole."""
    b, height, w, c = kept.shape[0], kept.shape[1] - 2, kept.shape[2], upsampler.out_features
    low = _divide(kept, pixels // 4)
    shape = (b, 2 * height + 2, 2 * w, resnet.conv1.out_features)

    def upsampled(row: Any) -> Map:
        """Rows 2 row - 1 … 2 row + 2 rows of the input; those outside of it are not zero."""
        return _convolved(upsampler, enlarge(_inside(_rows(kept, row, low.rows + 2), row, height)))

    def skips(carry: Any, row: Any, fresh: Any) -> Any:
        skip, seen = carry
        x = upsampled(row)[:, 1:-1]
        return _put(skip, 2 * row, resnet.conv_shortcut(x)), _update(seen, x, jnp.repeat(fresh, 2))

    start = _new(shape, kept), _no_moments((b, 0, 0, c))
    skip, moments = low.run(skips, start)
    normal = _normal(resnet.norm1, moments)

    def first(carry: Any, row: Any, fresh: Any) -> Any:
        inner, seen = carry
        y = _convolved(resnet.conv1, _inside(normal(upsampled(row)), 2 * row, 2 * height))
        return _put(inner, 2 * row, y), _update(seen, y, jnp.repeat(fresh, 2))

    inner, seen = low.run(first, (_new(shape, skip), _no_moments(shape)))
    return _second_half(resnet, inner, seen, skip, _divide(inner, pixels))


def _second_half(
    resnet: ResnetBlock2D, inner: Padded, moments: Moments, skip: Padded, strips: _Strips
) -> tuple[Padded, Moments]:
    """Adds the second convolution to `skip`, in its memory."""
    normal = _normal(resnet.norm2, moments)

    def second(carry: Any, row: Any, fresh: Any) -> Any:
        out, seen = carry
        y = _convolved(resnet.conv2, _inside(normal(_rows(inner, row, strips.rows + 2)), row, strips.height))
        old = _rows(out, row + 1, strips.rows)
        new = jnp.where(fresh[:, None, None], y + old, old)
        return _put(out, row, new), _update(seen, new, fresh)

    return strips.run(second, (skip, _no_moments(skip.shape)))


def _upsample(conv: Any, kept: Padded, pixels: int) -> tuple[Padded, Moments]:
    strips = _divide(kept, pixels // 4)
    b, height, w, _ = kept.shape
    shape = (b, 2 * height - 2, 2 * w, conv.out_features)

    def step(carry: Any, row: Any, fresh: Any) -> Any:
        out, seen = carry
        rows = _inside(_rows(kept, row, strips.rows + 2), row, strips.height)
        y = _convolved(conv, enlarge(rows))[:, 1:-1]
        return _put(out, 2 * row, y), _update(seen, y, jnp.repeat(fresh, 2))

    return strips.run(step, (_new(shape, kept), _no_moments(shape)))


def _last(decoder: Any, kept: Padded, moments: Moments, pixels: int) -> Map:
    strips = _divide(kept, pixels)
    normal = _normal(decoder.conv_norm_out, moments)

    def step(image: Array, row: Any, fresh: Any) -> Array:
        rows = _inside(normal(_rows(kept, row, strips.rows + 2)), row, strips.height)
        return _put(image, row, _convolved(decoder.conv_out, rows))

    image = _new((*kept.shape[:3], decoder.conv_out.out_features), kept)
    return strips.run(step, image)[:, 1:-1]


# ---- rows


def _divide(kept: Padded, pixels: int) -> _Strips:
    height = kept.shape[1] - 2
    rows = min(max(pixels // kept.shape[2], 1), height)
    return _Strips(height, rows, -(-height // rows))


def _new(shape: tuple[int, ...], before: Padded) -> Padded:
    """Returns a map to be filled, once the map `before` is there.

    XLA would make the zeros of all layers at the start, and one array of zeros for two maps, which it then copies.
    """
    return jnp.broadcast_to(before[:1, :1, :1, :1], shape)


def _pad(x: Map) -> Padded:
    return jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))


def _rows(kept: Padded, row: Any, count: int) -> Map:
    """Returns `count` rows of a padded map from row `row` - 1 of the map on."""
    return jax.lax.dynamic_slice_in_dim(kept, row, count, 1)


def _put(kept: Padded, row: Any, rows: Map) -> Padded:
    """Returns the padded map with these rows, of which the first is the map's row `row`."""
    return jax.lax.dynamic_update_slice_in_dim(kept, rows.astype(kept.dtype), row + 1, 1)


def _inside(rows: Map, row: Any, height: int) -> Map:
    """Returns rows `row` - 1 … with zeros outside of the map, which is what a convolution sees there."""
    number = row - 1 + jnp.arange(rows.shape[1])
    return jnp.where(((number >= 0) & (number < height))[:, None, None], rows, 0)


def _convolved(conv: Any, rows: Map) -> Map:
    """Returns a 3 x 3 convolution without its first and last row, which lack a neighbour."""
    kernel, bias = (p[...].astype(conv.dtype) for p in (conv.kernel, conv.bias))
    numbers = ("NHWC", "HWIO", "NHWC")
    rows = rows.astype(conv.dtype)
    return jax.lax.conv_general_dilated(rows, kernel, (1, 1), ((0, 0), (1, 1)), dimension_numbers=numbers) + bias


# ---- statistics


def _no_moments(shape: tuple[int, ...]) -> Moments:
    zeros = jnp.zeros((shape[0], 1, 1, shape[-1]))
    return Moments(jnp.zeros(()), zeros, zeros)


def _moments_of(x: Map) -> Moments:
    return _update(_no_moments(x.shape), x, jnp.ones(x.shape[1], bool))


def _update(seen: Moments, rows: Map, fresh: Array) -> Moments:
    """Returns the statistics with the fresh rows (Chan et al. 1979: no difference of large sums)."""
    weight = fresh.astype(jnp.float32)[:, None, None]
    count = fresh.sum() * rows.shape[2]
    x = rows.astype(jnp.float32)
    mean = (x * weight).sum((1, 2), keepdims=True) / count
    squares = (jnp.square(x - mean) * weight).sum((1, 2), keepdims=True)
    total = seen.count + count
    away = mean - seen.mean
    return Moments(
        total,
        seen.mean + away * (count / total),
        seen.squares + squares + jnp.square(away) * (seen.count * count / total),
    )


def _normal(norm: GroupNorm, moments: Moments) -> Callable[[Map], Map]:
    """Returns group norm and SiLU with the statistics of a whole map."""
    b, _, _, c = moments.mean.shape

    def over_group(channels: Array) -> Array:
        mean = channels.reshape(b, norm.groups, c // norm.groups).mean(-1)
        return jnp.repeat(mean, c // norm.groups, axis=-1)[:, None, None]

    mean = over_group(moments.mean)
    variance = over_group(moments.squares / moments.count + jnp.square(moments.mean - mean))
    scale, bias = (p[...].astype(jnp.float32) for p in (norm.scale, norm.bias))
    factor = jax.lax.rsqrt(variance + norm.eps) * scale

    def apply(x: Map) -> Map:
        return jax.nn.silu((x.astype(jnp.float32) - mean) * factor + bias).astype(norm.policy.compute)

    return apply
