"""Explicit collectives for sharded weights: one all-gather and one reduce-scatter per weight.

If XLA chooses the collectives, it shards the matrix products and exchanges activations instead, with hundreds of
all-to-alls. Here the network only sees gathered weights.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(part: jax.Array, axis: int, dtype: Any, grad_dtype: Any) -> jax.Array:
    """All-gathers a weight over "fsdp" along `axis` and returns it in `dtype`.

    The backward pass is `scatter`: each device receives its shard of the summed gradient, in float32.
    """
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True)


def scatter(gradient: jax.Array, axis: int, grad_dtype: Any) -> jax.Array:
    """Sums a gradient over "fsdp" in `grad_dtype` and returns this device's shard along `axis`, in float32."""
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
    """This device's shard of a weight; networks call `whole()` where they use the weight.

    Attributes:
      part: the shard on this device.
      shape: shape of the unsharded weight.
      axis: the sharded axis.
      dtype: dtype of the gathered weight.
      grad_dtype: dtype in which its gradient is summed.
    """

    part: jax.Array
    shape: tuple[int, ...]
    axis: int
    dtype: Any
    grad_dtype: Any

    def whole(self) -> jax.Array:
        """Returns the gathered weight."""
        return gather(self.part, self.axis, self.dtype, self.grad_dtype)
