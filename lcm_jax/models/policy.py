"""In which numbers the networks compute."""

import dataclasses

import jax.numpy as jnp

from lcm_jax.errors import one_of


@dataclasses.dataclass(frozen=True)
class Policy:
    """Weights are cast to `compute` where they are used, whatever dtype they are kept in.

    float32 under each policy: the sinusoids of time and guidance, the statistics of norms, softmax, the UNet's last
    convolution and its output.
    """

    compute: jnp.dtype

    @classmethod
    def named(cls, name: str) -> "Policy":
        """Returns the policy "float32" or "bfloat16"; raises UserError for another name."""
        one_of("dtype", name, ("float32", "bfloat16"))
        return cls(jnp.dtype(name))


FP32 = Policy(jnp.dtype("float32"))
