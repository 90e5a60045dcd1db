"""Compute dtype of the networks."""

import dataclasses

import jax.numpy as jnp

from lcm_jax.errors import one_of


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtype policy: weights are cast to `compute` where they are used, whatever their stored dtype.

    Always float32: the sinusoids of time and guidance, norm statistics, softmax, and the UNet's last convolution and
    output.
    """

    compute: jnp.dtype

    @classmethod
    def named(cls, name: str) -> "Policy":
        """Returns the policy "float32" or "bfloat16"; raises UserError for other names."""
        one_of("dtype", name, ("float32", "bfloat16"))
        return cls(jnp.dtype(name))


FP32 = Policy(jnp.dtype("float32"))
