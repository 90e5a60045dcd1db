"""lcm_jax: distil latent diffusion models into latent consistency models, in JAX.

import lcm_jax
pipe = lcm_jax.load_pipeline("path/to/diffusers/folder")
images = pipe(["a red seven on a blue background"], steps=4, seed=0)
pipe.save("folder")
"""

from typing import TYPE_CHECKING, Any

from lcm_jax.errors import UserError

if TYPE_CHECKING:
    from lcm_jax.inference.pipeline import Pipeline, load_pipeline

__all__ = ["Pipeline", "UserError", "load_pipeline"]


def __getattr__(name: str) -> Any:
    """Imports jax and the networks only on first use, so that the commands' --help is fast."""
    if name in ("Pipeline", "load_pipeline"):
        from lcm_jax.inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'lcm_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
