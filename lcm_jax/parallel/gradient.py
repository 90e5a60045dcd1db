"""The gradient of a loss over the global batch: each device takes its samples, micro-batch by micro-batch.

Inside `jax.shard_map` an array is what one device holds of it, so no activation can leave its device: all that is
exchanged are the weights and gradients of `exchange.py` and the sums at the end of `local` below.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lcm_jax.parallel import partition
from lcm_jax.parallel.exchange import Shard, scatter
from lcm_jax.parallel.mesh import AXES, BATCH, MeshConfig
from lcm_jax.parallel.partition import Axes, Shapes

Weights = dict[str, dict[str, Any]]  # {component: {path: array}}
Values = tuple[jax.Array, dict[str, jax.Array]]  # the loss, and other means over the samples
Gradient = Callable[[Weights, Weights, Weights, Any, Any], tuple[Values, Weights]]


def make_gradient(
    loss: Callable[..., Values], params: Shapes, frozen: Shapes, *, mesh: Mesh, config: MeshConfig, accumulate: int
) -> Gradient:
    """Returns `gradient(params, target, frozen, batch, draws) -> ((loss, aux), grads)`, to be called under jit.

    Args:
      loss: (params, target, frozen, batch, draws) -> (mean over the samples, {name: mean over the samples}). It gets
        `Shard`s in place of weights that come together where they are used.
      params, frozen: shapes of the weights, with the dtype in which the networks use them; the target's are `params`.
      accumulate: the number of micro-batches. They are strided over the global batch, each device dividing its own
        samples, and their gradients are added in float32.

    The gradient is float32, divided as the weights are, and the same on all devices that hold the same part.
    """
    fsdp = mesh.shape["fsdp"]
    axes = partition.divided_axes(params, fsdp)
    frozen_axes = partition.divided_axes(frozen, fsdp if config.frozen == "sharded" else 1)
    grad_dtype = jnp.dtype(config.grad_dtype)
    once = config.gather == "step"

    def shards(weights: Weights, axes: Axes, shapes: Shapes) -> Weights:
        def shard(part: jax.Array, axis: int | None, leaf: jax.ShapeDtypeStruct) -> Any:
            return part if axis is None else Shard(part, leaf.shape, axis, leaf.dtype, grad_dtype)

        return _map(shard, weights, axes, shapes)

    def with_shards(weights: Weights, target: Weights, others: Weights, batch: Any, draws: Any) -> Values:
        trained = (shards(w, axes, params) for w in (weights, target))
        return share(*trained, shards(others, frozen_axes, frozen), batch, draws)

    def share(*args: Any) -> Values:
        """What these samples add to the means over the global batch; to the gradient of the loss too."""
        return jax.tree.map(lambda x: x / (mesh.size * accumulate), loss(*args))

    def reduced(gradient: jax.Array, axis: int | None) -> jax.Array:
        """The sum over all devices, as float32; of a divided weight that of this device's part."""
        if axis is None:
            return jax.lax.psum(gradient.astype(grad_dtype), AXES).astype(jnp.float32)
        if once:  # else each use of the weight has summed over "fsdp" already
            gradient = scatter(gradient, axis, grad_dtype)
        return jax.lax.psum(gradient.astype(grad_dtype), "data").astype(jnp.float32)

    def local(weights: Weights, target: Weights, others: Weights, batch: Any, draws: Any) -> tuple[Values, Weights]:
        function = with_shards
        if once:
            function = share
            weights, target = (_whole(shards(w, axes, params)) for w in (weights, target))
            others = _whole(shards(others, frozen_axes, frozen))
        value_and_grad = jax.value_and_grad(function, has_aux=True)
        values, grads = _add_up(
            lambda part: value_and_grad(weights, target, others, *part), (batch, draws), parts=accumulate
        )
        grads = _map(reduced, grads, axes)
        return jax.tree.map(lambda x: jax.lax.psum(x, AXES), values), grads

    trained, others = partition.specs(axes), partition.specs(frozen_axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(trained, trained, others, BATCH, BATCH),
        out_specs=((P(), P()), trained),
        check_vma=False,  # the sums over devices are written out, not those that a type of "varying" would put in
    )


def _map(f: Callable[..., Any], *trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """f of the leaves of these, weight by weight; the first says which there are."""
    return {name: {path: f(*(tree[name][path] for tree in trees)) for path in flat} for name, flat in trees[0].items()}


def _whole(weights: Weights) -> Weights:
    return _map(lambda leaf: leaf.whole() if isinstance(leaf, Shard) else leaf, weights)


def _add_up(function: Callable[[Any], Any], batch: Any, *, parts: int) -> Any:
    """The sum of `function` over `parts` equal parts of the batch, one after the other, in float32."""
    if parts == 1:
        return function(batch)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], divided))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, function(part)), None

    return jax.lax.scan(add, zeros, divided)[0]
