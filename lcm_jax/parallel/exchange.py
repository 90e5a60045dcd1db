"""What devices tell each other of weights and gradients, written out: one all-gather and one reduce-scatter a weight.

Left to XLA, weights that are divided along an axis of a matrix product become products of parts of activations, and
these are exchanged instead: hundreds of all-to-alls. Here the network sees whole weights only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(part: jax.Array, axis: int, dtype: Any, grad_dtype: Any) -> jax.Array:
    """Returns the whole weight in `dtype`, from the parts along `axis` that the "fsdp" devices hold.

    Its gradient is `scatter`: each device receives its own part of the sum, in float32.
    """
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)


def scatter(gradient: jax.Array, axis: int, grad_dtype: Any) -> jax.Array:
    """Returns this device's part of the sum over "fsdp", float32; the sum is taken in `grad_dtype`."""
    summed = jax.lax.psum_scatter(gradient.astype(grad_dtype), "fsdp", scatter_dimension=axis, tiled=True)
    return summed.astype(jnp.float32)


def _forward(part: jax.Array, axis: int, dtype: Any, grad_dtype: Any) -> tuple[jax.Array, None]:
    return gather(part, axis, dtype, grad_dtype), None


def _backward(axis: int, dtype: Any, grad_dtype: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scatter(gradient, axis, grad_dtype),)


gather.defvjp(_forward, _backward)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["part"], meta_fields=["shape", "axis", "dtype", "grad_dtype"]
)
@dataclasses.dataclass(frozen=True)
class Shard:
    """A weight of which this device holds a part; a network calls `whole()` where it uses it.

    Attributes:
      part: what lies on this device.
      shape: of the whole.
      axis: the divided one.
      dtype: of the whole weight, when it has come together.
      grad_dtype: in which its gradient is summed.
    """

    part: jax.Array
    shape: tuple[int, ...]
    axis: int
    dtype: Any
    grad_dtype: Any

    def whole(self) -> jax.Array:
        """Returns the whole weight."""
        return gather(self.part, self.axis, self.dtype, self.grad_dtype)
