"""Runs network blocks, or their layers, with rematerialization, and gathers their sharded weights."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lcm_jax.models.functional import whole


def _all_but_whole_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """`jax.checkpoint` policy that saves all results except those of functions that all-gather a weight."""
    inner = params.get("call_jaxpr")
    return not (inner and any(equation.primitive.name == "all_gather" for equation in inner.eqns))


REMAT: dict[str, Callable[..., bool] | None] = {
    "none": _all_but_whole_weights,
    "block": None,  # saves only the block's inputs
    "block_save_attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "layer": None,  # saves only the inputs of the layers that the block runs by `run_layer`
}


def run_block(method: Callable[..., Any], module: nnx.Module, *args: Any, remat: str) -> Any:
    """Returns `method(module, *args)`, recomputing in the backward pass what the policy `remat` doesn't save.

    Sharded weights of `module` are gathered here, and again in the backward pass. With "layer" both are left to the
    block's layers.
    """
    return method(module, *args) if remat == "layer" else _run(method, module, *args, remat=remat)


def run_layer(method: Callable[..., Any], module: nnx.Module, *args: Any, remat: str) -> Any:
    """Does for a layer of a block what `run_block` does for the block, if `remat` is "layer"."""
    return _run(method, module, *args, remat=remat) if remat == "layer" else method(module, *args)


def _run(method: Callable[..., Any], module: nnx.Module, *args: Any, remat: str) -> Any:
    graphdef, weights = nnx.split(module)
    divided = any(hasattr(leaf, "whole") for leaf in jax.tree.leaves(weights, is_leaf=lambda x: hasattr(x, "whole")))
    if remat == "none" and not divided:
        return method(module, *args)

    def run(weights: nnx.State, *args: Any) -> Any:
        weights = jax.tree.map(whole, weights, is_leaf=lambda x: hasattr(x, "whole"))
        return method(nnx.merge(graphdef, weights), *args)

    return jax.checkpoint(run, policy=REMAT[remat])(weights, *args)
