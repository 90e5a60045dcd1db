"""The gradient of a loss over the global batch, accumulated over micro-batches on each device.

It runs inside `jax.shard_map`, where arrays are per-device, so activations never leave their device. The only
communication is that of weights and gradients (`exchange.py`) and the sums at the end of `local` below.
"""

from collections.abc import Callable, Sequence
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
    loss: Callable[..., Values],
    params: Shapes,
    frozen: Shapes,
    *,
    trains: Sequence[str] | None = None,
    mesh: Mesh,
    config: MeshConfig,
    accumulate: int,
) -> Gradient:
    """Returns `gradient(params, target, frozen, batch, draws) -> ((loss, aux), grads)`, to be called under jit.

    Args:
      loss: (params, target, frozen, batch, draws) -> (mean over the samples, {name: mean over the samples}). With
        `config.gather="block"` sharded weights are passed to it as `Shard`s.
      params, frozen: shapes of the weights and the dtype in which networks use them; `params` also describes target,
        which may lack networks whose average no loss reads.
      trains: names of the weights that the gradient is for; all by default.
      accumulate: number of micro-batches. Each device splits its own samples, so a micro-batch is strided over the
        global batch. Gradients are accumulated in float32.

    The gradient is float32 and sharded like the weights; devices that hold the same shard get the same values.
    """
    fsdp = mesh.shape["fsdp"]
    axes = partition.divided_axes(params, fsdp)
    frozen_axes = partition.divided_axes(frozen, fsdp if config.frozen == "sharded" else 1)
    grad_dtype = jnp.dtype(config.grad_dtype)
    once = config.gather == "step"
    names = tuple(params) if trains is None else tuple(trains)

    def shards(weights: Weights, axes: Axes, shapes: Shapes) -> Weights:
        def shard(part: jax.Array, axis: int | None, leaf: jax.ShapeDtypeStruct) -> Any:
            return part if axis is None else Shard(part, leaf.shape, axis, leaf.dtype, grad_dtype)

        return _map(shard, weights, axes, shapes)

    def with_shards(weights: Weights, target: Weights, others: Weights, batch: Any, draws: Any) -> Values:
        trained = (shards(w, axes, params) for w in (weights, target))
        return share(*trained, shards(others, frozen_axes, frozen), batch, draws)

    def share(*args: Any) -> Values:
        """The contribution of these samples to the means over the global batch, and so to the gradient."""
        return jax.tree.map(lambda x: x / (mesh.size * accumulate), loss(*args))

    def reduced(gradient: jax.Array, axis: int | None) -> jax.Array:
        """The gradient summed over all devices, in float32; for a sharded weight, this device's shard of it."""
        if axis is None:
            return jax.lax.psum(gradient.astype(grad_dtype), AXES).astype(jnp.float32)
        if once:  # otherwise the backward pass of `gather` has already summed over "fsdp"
            gradient = scatter(gradient, axis, grad_dtype)
        return jax.lax.psum(gradient.astype(grad_dtype), "data").astype(jnp.float32)

    def local(weights: Weights, target: Weights, others: Weights, batch: Any, draws: Any) -> tuple[Values, Weights]:
        function = with_shards
        if once:
            function = share
            weights, target = (_whole(shards(w, axes, params)) for w in (weights, target))
            others = _whole(shards(others, frozen_axes, frozen))
        changed = {name: weights[name] for name in names}

        def of_changed(changed: Weights, *args: Any) -> Values:
            return function({**weights, **changed}, *args)

        value_and_grad = jax.value_and_grad(of_changed, has_aux=True)
        values, grads = _add_up(
            lambda part: value_and_grad(changed, target, others, *part), (batch, draws), parts=accumulate
        )
        grads = _map(reduced, grads, axes)
        return jax.tree.map(lambda x: jax.lax.psum(x, AXES), values), grads

    trained = partition.specs(axes)

    def gradient(weights: Weights, target: Weights, others: Weights, batch: Any, draws: Any) -> tuple[Values, Weights]:
        averaged = {name: trained[name] for name in target}
        mapped = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(trained, averaged, partition.specs(frozen_axes), BATCH, BATCH),
            out_specs=((P(), P()), {name: trained[name] for name in names}),
            check_vma=False,  # the sums over devices are explicit, not inserted from "varying" types
        )
        return mapped(weights, target, others, batch, draws)

    return gradient


def _map(f: Callable[..., Any], *trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Applies f to the leaves of the trees, weight by weight, for the weights of the first tree."""
    return {name: {path: f(*(tree[name][path] for tree in trees)) for path in flat} for name, flat in trees[0].items()}


def _whole(weights: Weights) -> Weights:
    return _map(lambda leaf: leaf.whole() if isinstance(leaf, Shard) else leaf, weights)


def _add_up(function: Callable[[Any], Any], batch: Any, *, parts: int) -> Any:
    """Sums `function` over `parts` equal parts of the batch, sequentially; accumulates in float32 if parts > 1."""
    if parts == 1:
        return function(batch)
    divided = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], divided))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total, function(part)), None

    return jax.lax.scan(add, zeros, divided)[0]
