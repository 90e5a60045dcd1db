"""Reads and writes LoRA safetensors files in the dialect of diffusers and peft or of kohya's scripts.

A dialect determines only key names and where alpha is stored (`keys`, `alpha`). The layout is always PyTorch's: A is
(rank, in) or (rank, in, k, k), B is (out, rank) or (out, rank, 1, 1).
"""

import collections
import contextlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.adapters.lora import Adapter
from lcm_jax.errors import UserError, few, one_of
from lcm_jax.host import files
from lcm_jax.interop import names, weights
from lcm_jax.interop.lora import origin
from lcm_jax.interop.lora.alpha import (
    CONFIG_FILE,
    METADATA_KEY,
    Alphas,
    config_beside,
    configs_of_header,
    header_of,
)
from lcm_jax.interop.lora.keys import Name, Names, kohya_key, peft_key, refuse
from lcm_jax.interop.lora.tensors import adapter as adapter_of

DIALECTS = ("diffusers", "kohya")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # names used by diffusers and peft

Kernels = Mapping[str, Mapping[str, tuple[int, ...]]]  # component -> module -> shape of its kernel, as `lora.kernels`


def read_lora(path: str | os.PathLike[str], kernels: Kernels) -> dict[str, Adapter]:
    """Reads a LoRA file.

    Args:
      path: a safetensors file, or a folder that contains one (see `find`).
      kernels: component → module → kernel shape, for the networks that the LoRA may adapt.

    Returns:
      Component → adapter, for components in the file: numpy arrays in this package's names and layout, in the file's
      dtype.

    Raises:
      UserError: the file is missing, truncated or a pickle; it is not a plain LoRA (DoRA, LoHa, LoKr …); a tensor is
        for an unknown component or module, has the wrong shape, or lacks its A or B counterpart.
    """
    file = find(path)
    shapes = weights.read_shapes(file)
    with _in(file):  # before reading tensors: a file that is not a LoRA may be large
        refuse(shapes)
        names = _names(shapes, kernels)
    tensors, header = weights.read_file(file)
    parts: Any = collections.defaultdict(lambda: collections.defaultdict(dict))
    for key, name in names.items():
        parts[name.component][name.module][name.part] = (key, tensors[key])
    with _in(file):
        configs = configs_of_header(header, parts)
        if not configs and any("base_model.model." in key for key in tensors):
            configs = _configs_beside(file, parts)
        return {
            component: adapter_of(
                component,
                of,
                Alphas(configs.get(component, {})),
                kernels[component],
                origin.other_base(shapes, kernels),
            )
            for component, of in parts.items()
        }


@contextlib.contextmanager
def _in(file: pathlib.Path) -> Iterator[None]:
    """Prefixes the message of a UserError with the file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns a LoRA file's header metadata; raises UserError if the file is missing or can't be read."""
    return weights.read_header(find(path))


def write_lora(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    dialect: str = "diffusers",
    dtype: str = "float32",
    header: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes a LoRA to one safetensors file; an existing file is replaced.

    Args:
      path: the file, *.safetensors.
      adapters: component → adapter, in this package's names and layout.
      dialect: "diffusers" uses the keys of `save_lora_weights` and writes alpha to the header's
        `lora_adapter_metadata`, which diffusers reads from 0.34 on (other readers use alpha = rank). "kohya" writes
        alpha as tensors, with one value per network, since diffusers 0.42 gives every attention layer the most frequent
        alpha. Where alphas differ, B is scaled to keep dW.
      dtype: "float32", "float16" or "bfloat16".
      header: additional header metadata.

    Raises:
      UserError: unknown dialect or dtype; a name that doesn't end in .safetensors; the file can't be written.
    """
    one_of("dialect", dialect, DIALECTS)
    one_of("dtype", dtype, weights.DTYPES)
    path = pathlib.Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} should end in .safetensors")
    tensors, config = {}, {}
    for component, adapter in adapters.items():
        if dialect == "kohya":
            adapter = _with_one_alpha(adapter)
        for module, alpha in adapter.alphas.items():
            for part, suffix in (("A", lora.A), ("B", lora.B)):
                array = names.to_file(suffix, np.asarray(adapter.params[module + suffix]).astype(jnp.dtype(dtype)))
                tensors[_key(Name(component, module, part), dialect, adapters)] = np.ascontiguousarray(array)
            if dialect == "kohya":
                key = _key(Name(component, module, "alpha"), dialect, adapters)
                tensors[key] = np.asarray(alpha, np.float32)
        config |= header_of(component, adapter.ranks, adapter.alphas)
    texts = {"format": "pt", **(header or {})}
    if dialect == "diffusers":
        texts[METADATA_KEY] = json.dumps(config, indent=2, sort_keys=True)
    with files.new_file(path) as new:
        weights.save(new, tensors, texts)
    return path


def _with_one_alpha(adapter: Adapter) -> Adapter:
    """Returns an adapter with the same dW in which all modules have the most frequent alpha."""
    alpha = collections.Counter(adapter.alphas.values()).most_common(1)[0][0]
    scaled = {
        module + lora.B: np.asarray(adapter.params[module + lora.B]).astype(np.float32) * np.float32(own / alpha)
        for module, own in adapter.alphas.items()
        if own != alpha
    }
    return Adapter({**adapter.params, **scaled}, dict.fromkeys(adapter.alphas, alpha))


def _key(name: Name, dialect: str, adapters: Mapping[str, Adapter]) -> str:
    if dialect == "kohya":
        return kohya_key(name, two_text_encoders="text_encoder_2" in adapters)
    return peft_key(name)


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the LoRA file at a path; in a folder, the one named as in diffusers or peft, or the only .safetensors.

    Raises UserError if there is no such file, it is a pickle or can't be read, or a folder holds several candidates.
    """
    path = pathlib.Path(os.path.expanduser(path))
    try:
        if path.is_dir():
            return _find_in(path)
        if not path.exists():
            raise UserError(f"there is no LoRA file {path}")
    except OSError as error:  # a name that is too long, a folder that this user must not read
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    if path.suffix in weights.PICKLES:
        raise UserError(f"{path} is a pickle, and loading one can run any code in it; save it as safetensors")
    return path


def _find_in(folder: pathlib.Path) -> pathlib.Path:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    held = [file for file in files if file.suffix == ".safetensors"]
    for name in FILES:
        if folder / name in held:
            return folder / name
    if len(held) > 1:
        raise UserError(
            f"{folder} holds {len(held)} .safetensors files, none of them named {FILES[0]} or {FILES[1]}: give the "
            f"path of one ({few(file.name for file in held)})"
        )
    if held:
        return held[0]
    pickles = [file.name for file in files if file.suffix in weights.PICKLES]
    found = f"; {few(pickles)} can't be read: loading a pickle can run any code in it" if pickles else ""
    raise UserError(f"{folder} holds no LoRA: no {FILES[0]}, {FILES[1]} or other .safetensors file{found}")


def _names(shapes: Mapping[str, tuple[int, ...]], kernels: Kernels) -> dict[str, Name]:
    """Returns key → name; raises UserError for an empty file, duplicates, or tensors that match no module."""
    known = Names(kernels)
    names: dict[str, Name] = {}
    keys: dict[Name, str] = {}
    strangers = []
    for key in shapes:
        name = known.read(key)
        if name is None:
            strangers.append(key)
        elif keys.setdefault(name, key) != key:
            raise UserError(f"{keys[name]} and {key} are the same tensor in two spellings")
        else:
            names[key] = name
    if strangers:
        raise UserError(origin.strangers(shapes, strangers, kernels, known.fault(strangers[0])))
    if not names:
        raise UserError("it holds no tensor")
    return names


def _configs_beside(file: pathlib.Path, components: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns component → adapter_config.json, for files with peft's keys (base_model.model.…); warns without one."""
    config = config_beside(file)
    if config is None:
        warnings.warn(
            f"{file} doesn't store its alpha, and has no {CONFIG_FILE} beside it: using alpha = rank; if it was "
            "trained with another alpha, multiply its weight by alpha / rank",
            UserWarning,
            stacklevel=4,
        )
        return {}
    return dict.fromkeys(components, config)
