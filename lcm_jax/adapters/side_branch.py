"""Applying a network with its adapter beside the weights: y = base(x) + alpha / rank · B(A(x)).

The base's weights stay as they are, so their gradient is never computed and a bfloat16 forward pass doesn't round a
small difference away, as it would in W + dW. The network itself isn't told: its layers are replaced, in the copy that
one call makes of it, by layers with a branch.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from lcm_jax.adapters.lora import A, B
from lcm_jax.models import Network
from lcm_jax.models.functional import whole


class WithBranch(nnx.Module):
    """A linear layer or a convolution with a low-rank branch beside it; computes in the layer's own dtype."""

    def __init__(self, layer: nnx.Linear | nnx.Conv, a: jax.Array, b: jax.Array, scale: float) -> None:
        self.layer = layer
        self.down = nnx.clone(layer)  # the layer's own stride, padding and dtype
        self.down.kernel = nnx.Param(a)
        self.down.bias, self.down.use_bias = None, False
        self.up = nnx.Param(b)
        self.scale = scale

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*m d"]:
        y = self.layer(x)
        up = self.up[...].reshape(self.up.shape[-2:])  # a convolution's is 1 × 1
        return y + (self.down(x) @ up.astype(y.dtype)) * self.scale


def apply(
    network: Network,
    base: Mapping[str, Any],
    params: Mapping[str, Any],
    alphas: Mapping[str, float],
    *args: Any,
    method: str = "__call__",
    **kwargs: Any,
) -> Any:
    """Calls the network with the base's parameters and the adapter's.

    Args:
      network: of the base.
      base: path → array.
      params, alphas: as in `lcm_jax.adapters.lora.Adapter`.
      method, args, kwargs: what is called.

    Raises:
      UserError: the base's parameters don't fit the network.
    """
    model = network.bind(dict(base))
    for module, alpha in alphas.items():
        *parents, name = (int(part) if part.isdigit() else part for part in module.split("."))
        parent: Any = model
        for part in parents:
            parent = _child(parent, part)
        a, b = (p if network.in_block(module) else whole(p) for p in (params[module + A], params[module + B]))
        branched = WithBranch(_child(parent, name), a, b, alpha / b.shape[-2])
        if isinstance(name, int):
            parent[name] = branched
        else:
            setattr(parent, name, branched)
    return getattr(model, method)(*args, **kwargs)


def _child(module: Any, part: int | str) -> Any:
    return module[part] if isinstance(part, int) else getattr(module, part)
