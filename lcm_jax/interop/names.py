"""Maps parameter paths of this package to keys in safetensors files and back.

Path and key differ only in the last part: `kernel`, `scale` and `embedding` are `weight` in the file. Kernels are
transposed: convolutions are OIHW in the file and HWIO here, linear layers (out, in) in the file and (in, out) here.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from lcm_jax.errors import UserError, few

Shape = tuple[int, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# Attention projections in VAE folders written before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r".*attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")
_CLIP_PREFIX = "text_model."
# Tensors that a CLIP file may hold besides CLIPTextModel's parameters: a buffer of older versions, and the other parts
# of a CLIPModel. transformers ignores them.
_CLIP_OTHERS = re.compile(r".*embeddings\.position_ids|logit_scale|(text|visual)_projection\.weight|vision_model\..+")


def file_key(path: str) -> str:
    """Returns the key of the parameter `path` in current diffusers or transformers."""
    stem, _, leaf = path.rpartition(".")
    leaf = _LEAVES.get(leaf, leaf)
    return f"{stem}.{leaf}" if stem else leaf


def to_file(path: str, array: np.ndarray) -> np.ndarray:
    """Returns a parameter's array in the file's layout, as a view."""
    if path.endswith("kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def from_file(path: str, array: np.ndarray) -> np.ndarray:
    """Returns a file's array in this package's layout, as a view; the inverse of `to_file`."""
    if path.endswith("kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def file_shape(path: str, shape: Shape) -> Shape:
    """Returns the file's shape for the parameter `path` of shape `shape`."""
    if path.endswith("kernel"):
        return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
    return tuple(shape)


@dataclasses.dataclass(frozen=True)
class Match:
    """Result of `match`.

    Attributes:
      keys: parameter path → key in the file, for each parameter of the network.
      buffers: keys in the file that are allowed but not parameters, such as CLIP's `position_ids` or vision tower.
    """

    keys: dict[str, str]
    buffers: tuple[str, ...]


def match(library_class: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> Match:
    """Matches each tensor of a file to a parameter of the network.

    Args:
      library_class: the class in diffusers or transformers; its older key names are accepted too.
      found: key → shape, as in the file.
      wanted: parameter path → shape.
      where: the file, for error messages.

    Raises:
      UserError: tensors are missing, unexpected, duplicated or of the wrong shape; lists the first few and the count.
    """
    expected = {file_key(path): path for path in wanted}
    assert len(expected) == len(wanted), "two parameters of the network have the same key in the file"
    keys: dict[str, str] = {}
    buffers, unexpected, doubled, misshapen = [], [], [], []
    for key, shape in found.items():
        current = current_key(library_class, key, expected)
        if current not in expected:
            other = library_class.startswith("CLIPText") and _CLIP_OTHERS.fullmatch(key)
            (buffers if other else unexpected).append(key)
            continue
        path = expected[current]
        if path in keys:
            doubled.append(f"{keys[path]} and {key}")
            continue
        keys[path] = key
        want = file_shape(path, wanted[path])
        if squeezed(library_class, current, shape) != want:
            misshapen.append(f"{key} is {tuple(shape)} and should be {want}")
    missing = [key for key, path in expected.items() if path not in keys]
    faults = [
        f"{len(names)} {what} ({few(names)})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("given twice", doubled),
            ("of the wrong shape", misshapen),
        )
        if names
    ]
    if faults:
        raise UserError(f"{where}: its tensors don't fit the config.json beside it: {'; '.join(faults)}")
    return Match(keys, tuple(buffers))


def current_key(library_class: str, key: str, expected: Iterable[str]) -> str:
    """Returns the current diffusers or transformers name of a file's `key`.

    CLIP keys exist with and without the prefix `text_model.`; a key that is not in `expected` gets the other form.
    """
    if library_class == "AutoencoderKL" and (old := _OLD_ATTENTION_KEY.fullmatch(key)):
        return f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}"
    if library_class.startswith("CLIPText") and key not in expected:
        return key.removeprefix(_CLIP_PREFIX) if key.startswith(_CLIP_PREFIX) else _CLIP_PREFIX + key
    return key


def squeezed(library_class: str, current: str, shape: Shape) -> Shape:
    """Returns the shape, without the last two axes for a VAE attention weight stored as a 1 × 1 convolution."""
    if library_class == "AutoencoderKL" and len(shape) == 4 and _ATTENTION_WEIGHT.fullmatch(current):
        return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
    return tuple(shape)
