"""Reads and writes a component's safetensors files in the layout of diffusers and transformers.

The tensors are in one file (`diffusion_pytorch_model.safetensors`, `model.safetensors`), or in shards listed by an
index (`….safetensors.index.json`). File names may include a variant such as `fp16`. Files are written back in the
arrangement in which they were read. Pickle files are never read.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lcm_jax.errors import UserError, few
from lcm_jax.host import json_file
from lcm_jax.interop import places
from lcm_jax.interop.weight_faults import unreadable

Tensors = dict[str, np.ndarray]

DTYPES = ("float32", "float16", "bfloat16")  # dtypes for writing
VARIANTS = ("", "fp32", "fp16", "bf16")  # in order of preference
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_STEMS = ("diffusion_pytorch_model", "model")
# an index's variant is after `index` (`….safetensors.index.fp16.json`); older diffusers wrote it before `.safetensors`
_NAME = re.compile(
    rf"(?:{'|'.join(_STEMS)})(?:\.(?P<variant>[\w-]+))?\.safetensors(?:\.index(?:\.(?P<index_variant>[\w-]+))?\.json)?"
)
_SHARD = re.compile(r".*-\d+-of-\d+")
_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E4M3FNUZ": jnp.float8_e4m3fnuz,
    "F8_E5M2FNUZ": jnp.float8_e5m2fnuz,
}
# in the order in which a file holds them
_DTYPES = {
    **{"U64": np.uint64, "I64": np.int64, "F64": np.float64, "F32": np.float32, "U32": np.uint32, "I32": np.int32},
    **{"BF16": jnp.bfloat16, "F16": np.float16, "U16": np.uint16, "I16": np.int16},
    **{name: dtype for name, dtype in _FLOATS.items() if name.startswith("F8")},
    **{"I8": np.int8, "U8": np.uint8, "BOOL": np.bool_},
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How a component's tensors are distributed over files.

    Attributes:
      shard_of: key → name of the file that holds it.
      metadata: file name → header metadata, or None.
      index: name of the index file; "" for a single file.
      index_metadata: metadata of the index (`total_size`).
    """

    shard_of: dict[str, str]
    metadata: dict[str, dict[str, str] | None]
    index: str = ""
    index_metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def file_names(self) -> tuple[str, ...]:
        """Names of all files, including the index."""
        return tuple(self.metadata) + ((self.index,) if self.index else ())

    def renamed(self, new_names: dict[str, str]) -> "Arrangement":
        """Returns the arrangement with keys renamed by `new_names`, old → new."""
        shard_of = {new_names.get(key, key): name for key, name in self.shard_of.items()}
        return dataclasses.replace(self, shard_of=shard_of)


def one_file(name: str, keys: list[str]) -> Arrangement:
    """Returns an arrangement of all `keys` in one file, with the header that diffusers and transformers require."""
    return Arrangement(dict.fromkeys(keys, name), {name: {"format": "pt"}})


def is_weights(name: str) -> bool:
    """Returns whether a file name is that of a weight file or of an index of weight files."""
    return name.endswith((".safetensors", *PICKLES, ".msgpack", ".h5", ".onnx")) or ".safetensors.index." in name


def read_weights(directory: pathlib.Path) -> tuple[Tensors, Arrangement]:
    """Reads a component's tensors with the names, layout and dtypes of the file.

    The order of preference is no variant, `fp32`, `fp16`, `bf16`; any other variant is read if it is the only one. A
    single file is preferred over shards.

    Raises:
      UserError: there is no safetensors file, only pickles or several other variants; a shard is missing; a link leaves
        the model folder; a file can't be read.
    """
    file = _find(directory)
    if file is None:
        raise UserError(f"{directory} holds no weights: expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors")
    _check(file)
    if file.suffix == ".json":
        return _read_shards(file)
    tensors, metadata = read_file(file)
    return tensors, Arrangement(dict.fromkeys(tensors, file.name), {file.name: metadata})


def _find(directory: pathlib.Path) -> pathlib.Path | None:
    """Returns the component's weight file or the index of its shards; None if there are no weights."""
    found: dict[str, list[pathlib.Path]] = {}
    for path in directory.glob("*.safetensors*"):
        match = _NAME.fullmatch(path.name)
        if match and (path.is_file() or path.is_symlink()) and not _SHARD.fullmatch(match["variant"] or ""):
            found.setdefault(match["variant"] or match["index_variant"] or "", []).append(path)
    usual = [variant for variant in VARIANTS if variant in found]
    if not usual and len(found) > 1:
        raise UserError(f"{directory} holds its weights as several variants, {few(sorted(found))}; keep one of them")
    if found:
        files = found[usual[0] if usual else next(iter(found))]
        return min(files, key=lambda p: (not p.name.startswith(_STEMS[0]), p.suffix, p.name.endswith(".index.json")))
    pickles = sorted(p.name for p in directory.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{directory} holds its weights only as {pickles[0]}, a pickle, which is not loaded, since it can run any "
            "code in it; save the model again with save_pretrained(…, safe_serialization=True)"
        )
    return None


def _check(file: pathlib.Path) -> None:
    """Raises UserError if the file is a link out of the model folder, the parent of the component's folder."""
    places.part_file(file.parent.parent, file.parent.name, file.name)


def write_weights(
    directory: pathlib.Path, tensors: Tensors, arrangement: Arrangement, dtypes: Mapping[str, np.dtype] | None = None
) -> None:
    """Writes tensors, in the names and layout of the file, in the given arrangement, one after the other.

    `dtypes`: key → dtype to cast it to; the others stay as they are. No more than one tensor is copied at a time.

    Raises UserError if a file name is not a plain name, OSError if a file can't be written.
    """
    for name in arrangement.file_names:
        places.plain_name(name, f"the weights for {directory.name} name")
    for name, metadata in arrangement.metadata.items():
        keys = [key for key, file in arrangement.shard_of.items() if file == name]
        _write_file(directory / name, {key: tensors[key] for key in keys}, metadata, dtypes or {})
    if arrangement.index:
        index = {"metadata": arrangement.index_metadata, "weight_map": arrangement.shard_of}
        (directory / arrangement.index).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: pathlib.Path, tensors: Tensors, metadata: dict[str, str] | None, dtypes: Mapping[str, np.dtype]
) -> None:
    """Writes a safetensors file as `save_file` does, which needs all tensors cast and in the file's layout at once.

    The format is that of https://github.com/huggingface/safetensors: the header's length, the header, the tensors. As
    there, tensors of wider dtypes come first, so that all are aligned.
    """
    to = {key: np.dtype(dtypes.get(key, array.dtype)) for key, array in tensors.items()}
    order = sorted(tensors, key=lambda key: (list(_DTYPES).index(_NAMES[to[key]]), key))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key in order:
        start, end = end, end + tensors[key].size * to[key].itemsize
        name = _NAMES[to[key]]
        header[key] = {"dtype": name, "shape": list(tensors[key].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            array = np.ascontiguousarray(tensors[key].astype(to[key], copy=False))  # a transposed view has strides
            file.write(array.reshape(-1).view(np.uint8).data)


def save(path: pathlib.Path, tensors: Tensors, metadata: dict[str, str] | None) -> None:
    """Writes a safetensors file with the umask's permissions, since `save_file` makes files owner-only.

    Raises OSError if the file can't be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(*((int(number[1]), os.strerror(int(number[1]))) if number else (str(error),))) from None
    if path.stat().st_mode != mode:
        path.chmod(stat.S_IMODE(mode))


def read_file(path: pathlib.Path) -> tuple[Tensors, dict[str, str] | None]:
    """Returns the tensors and header metadata of a safetensors file; raises UserError if it can't be read."""
    with _opened(path) as file:
        dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (no iterator)
        floats = _read_floats(path, [key for key, dtype in dtypes.items() if dtype in _FLOATS])
        return {key: floats[key] if key in floats else file.get_tensor(key) for key in dtypes}, file.metadata()


def read_shapes(path: pathlib.Path) -> dict[str, tuple[int, ...]]:
    """Returns key → shape for a safetensors file, from its header; raises UserError if it can't be read."""
    with _opened(path) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def read_header(path: pathlib.Path) -> dict[str, str]:
    """Returns the header metadata of a safetensors file, {} if none; raises UserError if it can't be read."""
    with _opened(path) as file:
        return file.metadata() or {}


def _read_floats(path: pathlib.Path, keys: list[str]) -> Tensors:
    """Reads floating-point tensors by the offsets in the header; safetensors must have validated the file.

    safetensors maps the file into memory and copies each tensor, so that a process holds the weights twice for a
    while. It also looks types up in numpy, which lacks float8.
    """
    if not keys:
        return {}
    tensors = {}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json_file.parse(file.read(size), str(path))
        for key in keys:
            start, end = header[key]["data_offsets"]
            file.seek(8 + size + start)
            dtype = np.dtype(_FLOATS[header[key]["dtype"]])
            flat = np.fromfile(file, dtype, (end - start) // dtype.itemsize)
            tensors[key] = flat.reshape(header[key]["shape"])
    return tensors


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except AttributeError as error:  # numpy lacks the dtype
        raise UserError(f"{path} holds an unsupported dtype: {str(error).rpartition(' ')[2]}") from None
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path} {unreadable(path, error)}") from None


def _read_shards(index_path: pathlib.Path) -> tuple[Tensors, Arrangement]:
    index = json_file.read(index_path, {"weight_map": json_file.TEXTS, "metadata": json_file.or_none(json_file.OBJECT)})
    weight_map = index.get("weight_map")
    if not weight_map:
        raise UserError(f"{index_path} has no weight_map")
    tensors: Tensors = {}
    metadata: dict[str, dict[str, str] | None] = {}
    for name in sorted(set(weight_map.values())):
        places.plain_name(name, f"{index_path}: its weight_map names")
        _check(index_path.parent / name)
        shard, metadata[name] = read_file(index_path.parent / name)
        if strangers := [key for key in shard if weight_map.get(key) != name]:
            raise UserError(f"{index_path}: {name} holds {few(strangers)}, which the index doesn't list")
        tensors.update(shard)
    if lost := [key for key in weight_map if key not in tensors]:
        raise UserError(f"{index_path.parent / weight_map[lost[0]]} lacks {few(lost)}")
    return tensors, Arrangement(dict(weight_map), metadata, index_path.name, index.get("metadata") or {})
