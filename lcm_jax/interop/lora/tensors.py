"""A LoRA file's tensors, checked and paired: two halves and an alpha for each module."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from lcm_jax.adapters import lora
from lcm_jax.adapters.lora import Adapter
from lcm_jax.errors import UserError
from lcm_jax.interop import names
from lcm_jax.interop.lora.alpha import Alphas, is_alpha

Parts = Mapping[str, tuple[str, np.ndarray]]  # "A", "B", "alpha" -> key in the file, array


def adapter(
    component: str, modules: Mapping[str, Parts], alphas: Alphas, kernels: Mapping[str, tuple[int, ...]], base: str
) -> Adapter:
    """Returns the adapter of a network, in our names and layout and the file's dtype.

    Args:
      component: its name, for messages.
      modules: module → its tensors as the file has them.
      alphas: the alphas of modules that have no such tensor.
      kernels: module → shape of the network's kernel.
      base: what tells that the file was made for another model (`origin.other_base`), or "".

    Raises:
      UserError: a half is missing; the ranks of two halves differ; values that are no finite real numbers in float32;
        a tensor of another shape than its module needs; an alpha that is no number.
    """
    params, of_modules, misfits = {}, {}, {}
    for module, parts in modules.items():
        rank = _rank(module, parts)
        kernel = names.file_shape("kernel", kernels[module])
        wanted = {"A": (rank, *kernel[1:]), "B": (kernel[0], rank, *(1,) * (len(kernel) - 2))}
        for part, suffix in (("A", lora.A), ("B", lora.B)):
            key, array = parts[part]
            _check_values(key, array)
            if _without_ones(array.shape) != _without_ones(wanted[part]):
                misfits.setdefault(module, f"{key} is {array.shape} and should be {wanted[part]}")
            else:
                params[module + suffix] = names.from_file(suffix, array.reshape(wanted[part]))
        of_modules[module] = _alpha(parts["alpha"]) if "alpha" in parts else alphas.of(module, rank)
    if misfits:
        raise UserError(
            f"{base or 'it was made for another base'}: {len(misfits)} of its {len(modules)} modules don't fit this "
            f"model's {component}; {next(iter(misfits.values()))}"
        )
    return Adapter(params, of_modules)


def _rank(module: str, parts: Parts) -> int:
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
    return a.shape[0]


def _check_values(key: str, array: np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{key} is {array.dtype}; only real weights are read")
    if array.size == 0:
        raise UserError(f"{key} is empty")
    with np.errstate(over="ignore"):  # float64 beyond float32, which is found
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(f"{key} has values that are not finite in float32, in which LoRAs are merged")


def _alpha(part: tuple[str, np.ndarray]) -> float:
    key, array = part
    kind = array.dtype
    real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if array.size != 1 or not real or not is_alpha(value := float(array.reshape(()))):
        raise UserError(f"{key} should be one finite number, found {kind} {array.shape}")
    return value


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A linear layer's weights may be stored as a 1 × 1 convolution's, and the other way round."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
