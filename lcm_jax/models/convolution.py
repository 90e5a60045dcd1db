"""The gradients of a convolution of few pixels with many channels, as matrix products: faster on a CPU.

There the kernel is far larger than the map, as in the middle of a UNet at a small batch. A CPU's compiler brings the
whole kernel into another order for the gradient of the map, and the kernel's own gradient back from one: that takes
longer than all products. As one product for each of its taps, the kernel is read and written as it lies in memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def convolve(x: Float[Array, "b h w i"], kernel: Float[Array, "u v i o"], *args: Any, **options: Any) -> Array:
    """`jax.lax.conv_general_dilated` as `flax.nnx.Conv` calls it, for maps (B, H, W, C)."""
    strides, padding = args
    side = kernel.shape[0] // 2
    same = kernel.shape[0] == kernel.shape[1] == 2 * side + 1 and tuple(padding) == ((side, side),) * 2
    pixels = x.shape[0] * x.shape[1] * x.shape[2]
    if same and tuple(strides) == (1, 1) and pixels <= min(kernel.shape[2:]):
        return _same(x, kernel)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


def _plain(x: Array, kernel: Array) -> Array:
    side = kernel.shape[0] // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((side, side),) * 2, dimension_numbers=numbers)


_same = jax.custom_vjp(_plain)


def _gradients(kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    def plain(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(_plain, x, kernel)[1](dy)

    return jax.lax.platform_dependent(*kept, dy, cpu=_gradients_by_taps, default=plain)


_same.defvjp(lambda x, kernel: (_plain(x, kernel), (x, kernel)), _gradients)


def _gradients_by_taps(x: Array, kernel: Array, dy: Array) -> tuple[Array, Array]:
    """Of y(p) = sum over taps of x(p + tap - side) kernel(tap), x being zero outside of the map."""
    taps = [(u, v) for u in range(kernel.shape[0]) for v in range(kernel.shape[1])]
    last, (h, w) = len(kernel) - 1, x.shape[1:3]
    border = [(last // 2, last // 2)] * 2 + [(0, 0)]

    products = jnp.einsum("bhwo,uvio->uvbhwi", dy, kernel, preferred_element_type=jnp.float32)
    products = jnp.pad(products, [(0, 0)] * 3 + border)
    dx = sum(products[u, v, :, last - u : last - u + h, last - v : last - v + w] for u, v in taps)

    padded = jnp.pad(x, [(0, 0), *border])
    seen = jnp.stack([padded[:, u : u + h, v : v + w] for u, v in taps])
    dkernel = jnp.einsum("tbhwi,bhwo->tio", seen, dy, preferred_element_type=jnp.float32)
    return jnp.asarray(dx, x.dtype), dkernel.reshape(kernel.shape).astype(kernel.dtype)
