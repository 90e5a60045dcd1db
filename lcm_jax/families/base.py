"""The record of a family of teachers.

A condition is a tree of arrays whose first axis is the batch. Losses, guidance, samplers and caches drop, repeat and
mix it as a tree; only its family knows what it holds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

Condition = Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of teacher.

    Attributes:
      name: for messages.
      pipelines: the diffusers pipeline classes of its folders.
      denoiser: the component of a folder that predicts the noise.
      text_encoders: the components that make the condition.
      condition: (text encoder → its bound network, token ids) → the condition.
      call: (bound denoiser, z, t, condition, w embedding or None) → its raw output.
      w_embedding_dim: config of the denoiser → dimension of the w-embedding that it takes, or 0.
      with_w_embedding: (config of the denoiser, dimension or 0) → the config of one that takes a w-embedding.
      w_projection: path of the weight that `with_w_embedding` adds.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    text_encoders: tuple[str, ...]
    condition: Callable[[Mapping[str, Callable[..., jax.Array]], Any], Condition]
    call: Callable[..., jax.Array]
    w_embedding_dim: Callable[[Any], int]
    with_w_embedding: Callable[[Any, int], Any]
    w_projection: str
