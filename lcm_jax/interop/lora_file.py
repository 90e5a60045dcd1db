"""LoRA files: safetensors in the dialect of diffusers and peft, or in that of kohya's scripts, read and written.

A dialect decides only names and where alpha stands (`lora_keys`, `lora_alpha`): the layout is always torch's, A
(rank, in) or (rank, in, k, k), B (out, rank) or (out, rank, 1, 1).
"""

import collections
import json
import os
import pathlib
import tempfile
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from lcm_jax import lora
from lcm_jax.errors import UserError, one_of
from lcm_jax.interop import lora_alpha, lora_keys, names, weights
from lcm_jax.interop.lora_keys import Name
from lcm_jax.lora import Adapter

DIALECTS = ("diffusers", "kohya")
DTYPES = ("float32", "float16", "bfloat16")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")  # what diffusers and peft call it in a folder

Kernels = Mapping[str, Mapping[str, tuple[int, ...]]]  # component -> module -> shape of its kernel, as `lora.kernels`


def read_lora(path: str | os.PathLike[str], kernels: Kernels) -> dict[str, Adapter]:
    """Reads a LoRA for some networks.

    Args:
      path: a safetensors file, or the folder that diffusers' `save_lora_weights` or peft's `save_pretrained` writes.
      kernels: component → module → shape, of the networks that it may be for.

    Returns:
      Component → adapter, for those that the file holds: numpy arrays in our names and layout and the file's dtype.

    Raises:
      UserError: no such file, cut short, a pickle; no plain LoRA (DoRA, LoHa, LoKr …); a tensor for a component or a
        module that isn't there, of another shape than the module or its own other half needs, or without that half.
    """
    file = find(path)
    tensors, header = weights.read_file(file)
    try:
        lora_keys.refuse(tensors)
        parts = _parts(tensors, kernels)
        configs = lora_alpha.configs_of_header(header, parts)
        if not configs and any("base_model.model." in key for key in tensors):
            configs = _configs_beside(file, parts)
        return {component: _adapter(component, of, configs, kernels[component]) for component, of in parts.items()}
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the header's texts of a LoRA, of which `read_lora` reads the tensors; raises UserError likewise."""
    return weights.read_header(find(path))


def write_lora(
    path: str | os.PathLike[str],
    adapters: Mapping[str, Adapter],
    *,
    dialect: str = "diffusers",
    dtype: str = "float32",
    header: Mapping[str, str] | None = None,
) -> pathlib.Path:
    """Writes a LoRA as one safetensors file; one that is there already is replaced as a whole.

    Args:
      path: the file, *.safetensors.
      adapters: component → adapter, in our names and layout.
      dialect: "diffusers": keys as `save_lora_weights` writes them, alpha in the header's `lora_adapter_metadata`,
        which diffusers reads from 0.34 on (elsewhere alpha = rank is taken). "kohya": alpha is a tensor, one for all
        modules of a network, since diffusers 0.42 gives every attention layer the most frequent one; where alphas
        differ, B is scaled so that dW stays what it is.
      dtype: "float32", "float16" or "bfloat16".
      header: more texts for the file's header.

    Raises:
      UserError: another dialect or dtype; a name that doesn't end in .safetensors; no place to write.
    """
    one_of("dialect", dialect, DIALECTS)
    one_of("dtype", dtype, DTYPES)
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
        config |= lora_alpha.header_of(component, adapter.ranks, adapter.alphas)
    texts = {"format": "pt", **(header or {})}
    if dialect == "diffusers":
        texts[lora_alpha.METADATA_KEY] = json.dumps(config, indent=2, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            weights.save(pathlib.Path(temporary) / path.name, tensors, texts)
            os.replace(pathlib.Path(temporary) / path.name, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} can't be written: {getattr(error, 'strerror', None) or error}") from None
    return path


def _with_one_alpha(adapter: Adapter) -> Adapter:
    """The same dW, all modules with the most frequent alpha."""
    alpha = collections.Counter(adapter.alphas.values()).most_common(1)[0][0]
    scaled = {
        module + lora.B: np.asarray(adapter.params[module + lora.B]).astype(np.float32) * np.float32(own / alpha)
        for module, own in adapter.alphas.items()
        if own != alpha
    }
    return Adapter({**adapter.params, **scaled}, dict.fromkeys(adapter.alphas, alpha))


def _key(name: Name, dialect: str, adapters: Mapping[str, Adapter]) -> str:
    if dialect == "kohya":
        return lora_keys.kohya_key(name, two_text_encoders="text_encoder_2" in adapters)
    return lora_keys.peft_key(name)


def find(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the file of a LoRA, which may be in a folder; raises UserError if there is none, or a pickle."""
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        for name in FILES:
            if (path / name).is_file():
                return path / name
        raise UserError(f"{path} holds no LoRA: neither {FILES[0]} nor {FILES[1]}")
    if not path.exists():
        raise UserError(f"there is no LoRA file {path}")
    if path.suffix in weights.PICKLES:
        raise UserError(f"{path} is a pickle: reading one can run any code that is in it; save it as safetensors")
    return path


def _parts(
    tensors: Mapping[str, np.ndarray], kernels: Kernels
) -> dict[str, dict[str, dict[str, tuple[str, np.ndarray]]]]:
    """Returns component → module → part → (key, array)."""
    known = lora_keys.Names(kernels)
    parts: Any = collections.defaultdict(lambda: collections.defaultdict(dict))
    faults = []
    for key, array in tensors.items():
        try:
            name = known.read(key)
        except UserError as error:
            faults.append(str(error))
            continue
        given = parts[name.component][name.module]
        if name.part in given:
            raise UserError(f"{given[name.part][0]} and {key} are the same tensor in two spellings")
        given[name.part] = (key, array)
    if faults:
        others = f" ({len(faults)} of its {len(tensors)} tensors fit nowhere)" if len(faults) > 1 else ""
        raise UserError(f"{faults[0]}{others}; was it made for another base?")
    if not parts:
        raise UserError("it holds no tensor")
    return {component: dict(of) for component, of in parts.items()}


def _configs_beside(file: pathlib.Path, components: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What peft's own keys (base_model.model.…) are saved with: without it, nobody knows the alpha."""
    config = lora_alpha.config_beside(file)
    if config is None:
        warnings.warn(
            f"{file} doesn't say its alpha, and there is no {lora_alpha.CONFIG_FILE} beside it: alpha = rank is taken; "
            "if it was trained with another alpha, multiply its weight by alpha / rank",
            UserWarning,
            stacklevel=4,
        )
        return {}
    return dict.fromkeys(components, config)


def _adapter(
    component: str,
    modules: Mapping[str, Mapping[str, tuple[str, np.ndarray]]],
    configs: Mapping[str, Mapping[str, Any]],
    kernels: Mapping[str, tuple[int, ...]],
) -> Adapter:
    params, alphas, misfits = {}, {}, []
    for module, parts in modules.items():
        for part, other in (("A", "B"), ("B", "A")):
            if part not in parts:
                key = next(iter(parts.values()))[0] if other not in parts else parts[other][0]
                raise UserError(f"{key} has no other half: the {'down' if part == 'A' else 'up'} weights are missing")
        (key_a, a), (key_b, b) = parts["A"], parts["B"]
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise UserError(
                f"the ranks of {module} differ: {key_a} is {a.shape} and {key_b} is {b.shape}, which should be "
                "(rank, in, …) and (out, rank, …)"
            )
        for key, array in parts["A"], parts["B"]:
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise UserError(f"{key} is {array.dtype}; only real weights are read")
            if array.size == 0 or not np.isfinite(array.astype(np.float32)).all():
                raise UserError(f"{key} {'has values that are not finite' if array.size else 'is empty'}")
        rank, kernel = a.shape[0], names.file_shape("kernel", kernels[module])
        ones = (1,) * (len(kernel) - 2)
        for suffix, key, array, wanted in (
            (lora.A, key_a, a, (rank, *kernel[1:])),
            (lora.B, key_b, b, (kernel[0], rank, *ones)),
        ):
            if _without_ones(array.shape) != _without_ones(wanted):
                misfits.append(f"{key} is {array.shape} and should be {wanted}")
                continue
            params[module + suffix] = names.from_file(suffix, array.reshape(wanted))
        alphas[module] = _alpha(module, parts, configs.get(component, {}), rank)
    if misfits:
        raise UserError(
            f"{misfits[0]} in this model's {component} ({len(misfits)} of its {2 * len(modules)} tensors don't fit); "
            "it was made for another base"
        )
    return Adapter(params, alphas)


def _alpha(module: str, parts: Mapping[str, tuple[str, np.ndarray]], config: Mapping[str, Any], rank: int) -> float:
    if "alpha" not in parts:
        return lora_alpha.alpha_of(config, module, rank)
    key, array = parts["alpha"]
    if array.size != 1 or not np.isfinite(float(array.reshape(()))):
        raise UserError(f"{key} should be one finite number, found {array.dtype} {array.shape}")
    return float(array.reshape(()))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's weights may be stored as a 1 × 1 convolution's, and the other way round."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
