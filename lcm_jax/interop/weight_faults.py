"""Finds faults in weight files: not a safetensors file, or values that are not finite numbers."""

import concurrent.futures
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from lcm_jax.errors import UserError, few

_CHUNK = 2**22  # values checked at once, to limit memory
_START = 512  # bytes read to identify a file
# first bytes → file type
_OTHERS = (
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself; fetch it with `git lfs pull`"),
    (b"PK\x03\x04", "a pickle or another zip file, not safetensors"),
    (b"\x80", "a pickle, not safetensors"),
    (b"GGUF", "a GGUF file, not safetensors"),
    (b"\x89HDF", "an HDF5 file, not safetensors"),
    (b"\x1f\x8b", "a gzip file, not safetensors; unpack it"),
)


def check_finite(tensors: Mapping[str, np.ndarray], file_of: Mapping[str, str]) -> None:
    """Checks that weights (key → array) are of a floating-point type (8 to 64 bits) and finite in float32.

    Raises UserError with the file, from `file_of` (key → file), and the first few keys and their faults.
    """
    with concurrent.futures.ThreadPoolExecutor() as pool:  # numpy releases the GIL
        faults = {key: fault for key, fault in zip(tensors, pool.map(_fault, tensors.values()), strict=True) if fault}
    if faults:
        file = file_of[next(iter(faults))]
        raise UserError(f"{file}: not finite floating-point numbers: {few(f'{k} ({v})' for k, v in faults.items())}")


def _fault(array: np.ndarray) -> str:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return str(array.dtype)
    flat = array.reshape(-1)
    wrong = sum(_not_finite(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK))
    return f"NaN or infinity in {wrong} of {flat.size}" if wrong else ""


def _not_finite(flat: np.ndarray) -> int:
    if flat.dtype in (np.float16, jnp.bfloat16):  # exponent bits: several times faster than isfinite
        exponent = np.asarray(np.inf, flat.dtype).view(np.uint16)
        return int(np.count_nonzero((flat.view(np.uint16) & exponent) == exponent))
    if flat.dtype == np.float64:  # used in float32, where larger numbers overflow
        with np.errstate(over="ignore"):
            flat = flat.astype(np.float32)
    return flat.size - int(np.count_nonzero(np.isfinite(flat)))


def unreadable(path: pathlib.Path, error: Exception) -> str:
    """Returns why safetensors can't read a file: another file type, or a truncated file."""
    try:
        with path.open("rb") as file:
            start, size = file.read(_START), path.stat().st_size
    except OSError as reason:
        return f"can't be read: {reason.strerror or reason}"
    if not size:
        return "is empty"
    for magic, what in _OTHERS:
        if start.startswith(magic):
            return f"is {what}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not the file itself; download it again"
    if text.startswith(b"{"):
        return "is JSON, not safetensors"
    header = int.from_bytes(start[:8], "little")
    if size < 8:
        return f"can't be read as safetensors: it is truncated, {size} bytes"
    if start[8:9] not in (b"{", b""):
        return "can't be read as safetensors: it has no safetensors header"
    if 8 + header > size:
        return f"can't be read as safetensors: it is truncated, {size} bytes of at least {8 + header}"
    return f"can't be read as safetensors, it may be truncated: {error}"
