"""Gradients of convolutions with few pixels and many channels, as matrix products: faster on CPU.

In such layers (the middle of a UNet at a small batch size) the kernel is far larger than the feature map. XLA on CPU
transposes the kernel for the input's gradient and transposes the kernel's gradient back, which takes longer than the
products. With one product per kernel tap, the kernel is read and written in its memory layout.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float


def convolve(
    x: Float[Array, "b h w i"], kernel: Float[Array, "u v i o"], strides: Any, padding: Any, **options: Any
) -> Array:
    """Replaces `jax.lax.conv_general_dilated` in `flax.nnx.Conv`; dilation and groups are not supported."""
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


def _gradients(kept: tuple[Array, Array, Any], dy: Any) -> tuple[Array, Array | None]:
    """Returns the gradients of input and kernel; None for a frozen kernel, whose gradient isn't computed."""
    x, kernel, trained = kept
    if isinstance(dy, SymbolicZero):
        return jnp.zeros_like(x), None
    dx = jax.lax.platform_dependent(x, kernel, dy, cpu=_map_by_taps, default=lambda *a: _of(0, *a))
    if trained is None:
        return dx, None
    return dx, jax.lax.platform_dependent(x, kernel, dy, cpu=_kernel_by_taps, default=lambda *a: _of(1, *a))


def _of(which: int, x: Array, kernel: Array, dy: Array) -> Array:
    """Returns the gradient of the input (`which` = 0) or of the kernel (1)."""
    args = [x, kernel]

    def convolved(part: Array) -> Array:
        return _plain(*(part if i == which else a for i, a in enumerate(args)))

    return jax.linear_transpose(convolved, args[which])(dy)[0]


def _forward(x: Any, kernel: Any) -> tuple[Array, tuple[Array, Array, tuple[()] | None]]:
    return _plain(x.value, kernel.value), (x.value, kernel.value, () if kernel.perturbed else None)


_same.defvjp(_forward, _gradients, symbolic_zeros=True)


# y(p) = sum over taps of x(p + tap - side) kernel(tap), with zero padding


def _map_by_taps(x: Array, kernel: Array, dy: Array) -> Array:
    last, (h, w) = len(kernel) - 1, x.shape[1:3]
    products = jnp.einsum("bhwo,uvio->uvbhwi", dy, kernel, preferred_element_type=jnp.float32)
    products = jnp.pad(products, [(0, 0)] * 3 + [(last // 2, last // 2)] * 2 + [(0, 0)])
    shifted = (products[u, v, :, last - u : last - u + h, last - v : last - v + w] for u, v in _taps(kernel))
    return functools.reduce(jnp.add, shifted).astype(x.dtype)


def _kernel_by_taps(x: Array, kernel: Array, dy: Array) -> Array:
    side, (h, w) = len(kernel) // 2, x.shape[1:3]
    padded = jnp.pad(x, [(0, 0), (side, side), (side, side), (0, 0)])
    seen = jnp.stack([padded[:, u : u + h, v : v + w] for u, v in _taps(kernel)])
    dkernel = jnp.einsum("tbhwi,bhwo->tio", seen, dy, preferred_element_type=jnp.float32)
    return dkernel.reshape(kernel.shape).astype(kernel.dtype)


def _taps(kernel: Array) -> list[tuple[int, int]]:
    return [(u, v) for u in range(kernel.shape[0]) for v in range(kernel.shape[1])]
