"""A network with its weights on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lcm_jax.interop.folder import Component
from lcm_jax.models import Flat, Network, Policy


class Bound:
    """A network bound to its weights, called with arrays; `method` selects another method than `__call__`."""

    def __init__(self, network: Network, params: Flat) -> None:
        self.network = network
        self.params = params
        self._apply: Callable[..., Any] = jax.jit(network.apply, static_argnames="method")

    def __call__(self, *args: Any, method: str = "__call__", **kwargs: Any) -> Any:
        """Applies the network, jitted; arrays are NHWC."""
        return self._apply(self.params, *args, method=method, **kwargs)


def bind(component: Component, policy: Policy) -> Bound:
    """Returns the component's network, with its weights on the device."""
    return Bound(component.network(policy=policy), {path: put(of, policy) for path, of in component.params.items()})


def put(array: np.ndarray, policy: Policy) -> jax.Array:
    """Puts an array on the device, in the file's dtype or the compute dtype, whichever is smaller."""
    smaller = jnp.dtype(policy.compute).itemsize < array.dtype.itemsize
    return jnp.asarray(array, policy.compute if smaller else array.dtype)
