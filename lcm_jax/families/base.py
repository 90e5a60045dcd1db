"""The record of a family of teachers.

A condition is a tree of arrays whose first axis is the batch. Losses, guidance, samplers and caches drop, repeat and
mix it as a tree; only its family knows what it holds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from lcm_jax.interop.layouts import Layout

Condition = Any
Tokens = Any  # int32 (B, L), or {tokenizer: int32 (B, L)} in a family with several


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of teacher.

    Attributes:
      name: for messages.
      layout: of its folders; `interop.layouts.LAYOUTS` has the diffusers pipeline classes of each layout.
      text_encoders: the components that make the condition.
      condition: (text encoder → its bound network, tokens, (height, width) of the images) → the condition.
      call: (bound denoiser, z, t, condition, w embedding or None) → its raw output.
      w_embedding_dim: config of the denoiser → dimension of the w-embedding that it takes, or 0.
      with_w_embedding: (config of the denoiser, dimension or 0) → the config of one that takes a w-embedding.
      w_projection: path of the weight that `with_w_embedding` adds.
      null: condition of the empty prompt → what guidance leads away from without a negative prompt; None: itself.
    """

    name: str
    layout: Layout
    text_encoders: tuple[str, ...]
    condition: Callable[[Mapping[str, Callable[..., Any]], Tokens, tuple[int, int]], Condition]
    call: Callable[..., jax.Array]
    w_embedding_dim: Callable[[Any], int]
    with_w_embedding: Callable[[Any, int], Any]
    w_projection: str
    null: Callable[[Condition], Condition] | None = None

    @property
    def denoiser(self) -> str:
        """The component of a folder that predicts the noise."""
        return self.layout.denoiser
