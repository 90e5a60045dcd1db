"""Parameter names: ours and those in a safetensors file, a bijection.

A parameter's path here is its key in the file up to the last part: `kernel`, `scale` and `embedding` are all called
`weight` there. Kernels are also stored the other way round: a convolution's is OIHW there and HWIO here, a linear
layer's is (out, in) there and (in, out) here.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from lcm_jax.errors import UserError, few

Shape = tuple[int, ...]

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# VAE folders written before diffusers 0.18 call the projections of an attention layer so.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_KEY = re.compile(r"(.*attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_ATTENTION_WEIGHT = re.compile(r".*attentions\.\d+\.(to_q|to_k|to_v|to_out\.0)\.weight")
_CLIP_PREFIX = "text_model."
# What a CLIP file may hold beside the parameters of CLIPTextModel: a buffer of older versions, and the other parts of a
# CLIPModel. transformers reads over them.
_CLIP_OTHERS = re.compile(r".*embeddings\.position_ids|logit_scale|(text|visual)_projection\.weight|vision_model\..+")


def file_key(path: str) -> str:
    """Returns the key that the peer's current version gives to our parameter `path`."""
    stem, _, leaf = path.rpartition(".")
    leaf = _LEAVES.get(leaf, leaf)
    return f"{stem}.{leaf}" if stem else leaf


def to_file(path: str, array: np.ndarray) -> np.ndarray:
    """Returns our array in the file's layout (a view)."""
    if path.endswith("kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array


def from_file(path: str, array: np.ndarray) -> np.ndarray:
    """Returns a file's array in our layout (a view): the inverse of `to_file`."""
    if path.endswith("kernel"):
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array


def file_shape(path: str, shape: Shape) -> Shape:
    """Returns the shape in the file of our parameter `path` with our shape `shape`."""
    if path.endswith("kernel"):
        return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
    return tuple(shape)


@dataclasses.dataclass(frozen=True)
class Match:
    """Which tensor of a file is which parameter.

    Attributes:
      keys: our path → key in the file, for each parameter of the network, once.
      buffers: keys in the file that hold no parameter but may be there (CLIP's `position_ids`, its vision tower).
    """

    keys: dict[str, str]
    buffers: tuple[str, ...]


def match(library_class: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape], where: str) -> Match:
    """Pairs each tensor of a file with a parameter of the network.

    Args:
      library_class: the peer's class name, whose older spellings are read too.
      found: key → shape, as in the file.
      wanted: our path → our shape.
      where: the file, for the message.

    Raises:
      UserError: names what is missing, unexpected, doubled or of another shape, first few and count.
    """
    expected = {file_key(path): path for path in wanted}
    assert len(expected) == len(wanted), "two parameters of the network have one key in the file"
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
    """Returns the key that the peer's current version gives to what a file calls `key`.

    CLIP's keys come with and without the prefix `text_model.`; the form that is in `expected` is returned.
    """
    if library_class == "AutoencoderKL" and (old := _OLD_ATTENTION_KEY.fullmatch(key)):
        return f"{old[1]}.{_OLD_ATTENTION[old[2]]}.{old[3]}"
    if library_class.startswith("CLIPText") and key not in expected:
        return key.removeprefix(_CLIP_PREFIX) if key.startswith(_CLIP_PREFIX) else _CLIP_PREFIX + key
    return key


def squeezed(library_class: str, current: str, shape: Shape) -> Shape:
    """Returns the shape without the two ones of a VAE attention weight that is stored as a 1 × 1 convolution."""
    if library_class == "AutoencoderKL" and len(shape) == 4 and _ATTENTION_WEIGHT.fullmatch(current):
        return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
    return tuple(shape)
