"""Applies a network with a LoRA branch beside each adapted layer: y = base(x) + alpha / rank · B(A(x)).

The base weights stay unchanged: their gradient is never computed, and bfloat16 doesn't round a small dW away as it
would in W + dW. Each call binds a new model and replaces its adapted layers by `WithBranch`; the network classes need
no LoRA code.
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
    """A linear layer or convolution with a low-rank branch, computed in the layer's dtype."""

    def __init__(self, layer: nnx.Linear | nnx.Conv, a: jax.Array, b: jax.Array, scale: float) -> None:
        self.layer = layer
        self.down = nnx.clone(layer)  # same stride, padding and dtype
        self.down.kernel = nnx.Param(a)
        self.down.bias, self.down.use_bias = None, False
        self.up = nnx.Param(b)
        self.scale = scale

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*m d"]:
        y = self.layer(x)
        up = self.up[...].reshape(self.up.shape[-2:])  # a convolution's B is 1 × 1
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
    """Calls the network with the base parameters and an adapter.

    Args:
      network: the base network.
      base: path → array.
      params, alphas: as in `lcm_jax.adapters.lora.Adapter`.
      method: name of the model's method to call with `args` and `kwargs`.

    Raises:
      UserError: the base parameters don't fit the network.
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
