"""Checks a LoRA file's tensors and groups them by module: A, B and alpha."""

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
    """Returns a network's adapter, in this package's names and layout, in the file's dtype.

    Args:
      component: the network's name, for error messages.
      modules: module → its tensors in the file.
      alphas: alphas of modules without an alpha tensor.
      kernels: module → kernel shape of the network.
      base: the message that the file was made for another model (`origin.other_base`), or "".

    Raises:
      UserError: A or B is missing; their ranks differ; values are not finite real numbers in float32; a shape doesn't
        fit its module; an alpha is not a number.
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
            f"{base or 'it was trained on another base model'}: {len(misfits)} of its {len(modules)} modules "
            f"don't fit this model's {component}; {next(iter(misfits.values()))}"
        )
    return Adapter(params, of_modules)


def _rank(module: str, parts: Parts) -> int:
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts:
            key = next(iter(parts.values()))[0] if other not in parts else parts[other][0]
            raise UserError(f"{key} has no counterpart: the {'down' if part == 'A' else 'up'} weights are missing")
    (key_a, a), (key_b, b) = parts["A"], parts["B"]
    if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"the ranks of {module} differ: {key_a} is {a.shape} and {key_b} is {b.shape}, which should be "
            "(rank, in, …) and (out, rank, …)"
        )
    return a.shape[0]


def _check_values(key: str, array: np.ndarray) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise UserError(f"{key} is {array.dtype}; only real weights are supported")
    if array.size == 0:
        raise UserError(f"{key} is empty")
    with np.errstate(over="ignore"):  # float64 values may overflow; checked below
        single = array.astype(np.float32)
    if not np.isfinite(single).all():
        raise UserError(f"{key} has values that are not finite in float32, the dtype of merging")


def _alpha(part: tuple[str, np.ndarray]) -> float:
    key, array = part
    kind = array.dtype
    real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if array.size != 1 or not real or not is_alpha(value := float(array.reshape(()))):
        raise UserError(f"{key} should be one finite number, found {kind} {array.shape}")
    return value


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape without trailing (1, 1): linear weights may be stored as 1 × 1 convolutions and vice versa."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)
