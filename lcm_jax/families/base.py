"""The record of a family of teachers.

A condition is a tree of arrays whose first axis is the batch. Losses, guidance, samplers and caches drop, repeat and
mix it as a tree; only its family knows what it holds. It is made of a text, the features that the text encoders compute
of the tokens, and of the sizes of the images where the family conditions on them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from lcm_jax.interop.layouts import Layout

Condition = Any
Text = Any  # tree of arrays (B, …); (1, …) for one text of all samples
Tokens = Any  # int32 (B, L), or {tokenizer: int32 (B, L)} in a family with several


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of teacher.

    Attributes:
      name: for messages.
      layout: of its folders; `interop.layouts.LAYOUTS` has the diffusers pipeline classes of each layout.
      text_encoders: the components that make the condition.
      encode: (text encoder → its bound network, tokens) → the text.
      condition: (text, sizes as in `default_sizes`, or None unless `uses_sizes`) → the condition. Texts (1, …) may stay
        so, beside sizes (B, 6).
      call: (bound denoiser, z, t, condition, w embedding or None) → its raw output.
      w_embedding_dim: config of the denoiser → dimension of the w-embedding that it takes, or 0.
      with_w_embedding: (config of the denoiser, dimension or 0) → the config of one that takes a w-embedding.
      w_projection: path of the weight that `with_w_embedding` adds.
      null: text → what guidance leads away from without a negative prompt; None: the encoded empty prompt.
      null_setting: the setting in model_index.json that must be true, its default, for `null` to apply.
      uses_sizes: whether the condition depends on the sizes of the images.
      guidance: diffusers' default guidance_scale for a diffusion model.
      strength: diffusers' default strength of image to image.
      student_guidance: the same for a consistency model with a w-embedding.
    """

    name: str
    layout: Layout
    text_encoders: tuple[str, ...]
    encode: Callable[[Mapping[str, Callable[..., Any]], Tokens], Text]
    condition: Callable[[Text, Int[Array, "b 6"] | None], Condition]
    call: Callable[..., jax.Array]
    w_embedding_dim: Callable[[Any], int]
    with_w_embedding: Callable[[Any, int], Any]
    w_projection: str
    null: Callable[[Text], Text] | None = None
    null_setting: str = ""
    uses_sizes: bool = False
    guidance: float = 7.5
    student_guidance: float = 8.5
    strength: float = 0.8

    @property
    def denoiser(self) -> str:
        """The component of a folder that predicts the noise."""
        return self.layout.denoiser

    def of_folder(self, model_index: Mapping[str, Any]) -> "Family":
        """Returns this record as the settings in model_index.json make it."""
        off = self.null_setting and not model_index.get(self.null_setting, True)
        return dataclasses.replace(self, null=None) if off else self


def default_sizes(count: int, height: int, width: int) -> Int[np.ndarray, "count 6"]:
    """Returns the sizes of `count` uncropped images of height x width pixels.

    A row is original height and width, top and left of the crop in the resized image, height and width of the result
    (SDXL, arXiv 2307.01952, section 2.2).
    """
    return np.tile(np.asarray([height, width, 0, 0, height, width], np.int32), (count, 1))
